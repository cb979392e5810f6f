"""Policies of fewest bits, or of least time, that keep a bound on what they cost in quality."""
