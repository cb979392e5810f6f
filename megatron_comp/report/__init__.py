# SPDX-License-Identifier: Apache-2.0
"""One page of what other commands have measured, to be shown to somebody else."""
