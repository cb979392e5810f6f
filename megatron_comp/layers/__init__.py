"""Megatron's places that sum partial results, with compressed collectives."""
