# SPDX-License-Identifier: Apache-2.0
"""The package's version, in one place that every room may read, installed or not."""

__version__ = "0.1.0"
