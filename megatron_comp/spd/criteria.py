# SPDX-License-Identifier: Apache-2.0
"""Names that options take: criteria by which heads are assigned to ranks (`heads.py`), losses (`training.py`)."""

ASSIGNMENTS = ("diverse", "similar")
MATCHES = ("norm", "error")
CRITERIA = tuple(f"{assign}-{match}" for assign in ASSIGNMENTS for match in MATCHES)
LOSSES = ("relative", "mse")
