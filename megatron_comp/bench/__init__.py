# SPDX-License-Identifier: Apache-2.0
"""Measured times of codecs, collectives and links."""
