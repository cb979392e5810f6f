"""The subcommands of `megatron-comp`: a thin module each: options, call, table."""
