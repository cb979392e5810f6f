# SPDX-License-Identifier: Apache-2.0
"""Ranks on this machine, their network, and the tables and JSON that they leave."""
