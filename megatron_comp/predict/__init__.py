# SPDX-License-Identifier: Apache-2.0
"""Predicted times of models on GPUs and links that need not be here."""
