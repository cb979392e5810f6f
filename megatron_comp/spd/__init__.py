# SPDX-License-Identifier: Apache-2.0
"""Sync-point drop: blocks without the sum after attention, and weights that make up for it."""
