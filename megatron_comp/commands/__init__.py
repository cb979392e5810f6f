# SPDX-License-Identifier: Apache-2.0
"""The subcommands of `megatron-comp`: a thin module each: options, call, table."""
