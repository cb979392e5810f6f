# SPDX-License-Identifier: Apache-2.0
"""Policies of fewest bits, or of least time, that keep a bound on what they cost in quality."""
