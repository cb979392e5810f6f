# SPDX-License-Identifier: Apache-2.0
"""Names of the algorithms by which an all-reduce can go."""

# Of which all ranks take the same part.
FLAT = ("gather_sum", "two_step")
ALGORITHMS = ("auto", *FLAT, "hierarchical")
