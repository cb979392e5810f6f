# SPDX-License-Identifier: Apache-2.0
"""Megatron's places that sum partial results, with compressed collectives."""
