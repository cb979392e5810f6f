# SPDX-License-Identifier: Apache-2.0
"""What a user can say to each subcommand: only the standard library is imported, so that `--help` answers at once."""
