"""What the subcommands of `megatron-comp` do: one module each, and what they share."""
