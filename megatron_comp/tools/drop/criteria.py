"""Names of the criteria by which heads are assigned to ranks; what they mean is in `heads.py`."""

ASSIGNMENTS = ("diverse", "similar")
MATCHES = ("norm", "error")
CRITERIA = tuple(f"{assign}-{match}" for assign in ASSIGNMENTS for match in MATCHES)
