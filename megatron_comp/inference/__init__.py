# SPDX-License-Identifier: Apache-2.0
"""Llama checkpoints on Megatron-Core: `model` builds, `generate` runs, `hf` reads weights, `cpu` helps without CUDA."""
