# SPDX-License-Identifier: Apache-2.0
"""Stands in for `megatron.training` of Megatron-LM, which needs CUDA: what lm_eval's class `megatron_lm` takes of it.

Ranks over gloo, weights of a seed in the place of a checkpoint, and a tokenizer of bytes. The model itself the class
builds by the real Megatron-Core.
"""

import argparse
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

_ARGS = argparse.Namespace(
    padded_vocab_size=256,
    seq_length=64,
    num_experts=None,
    heterogeneous_layers_config_path=None,
    transformer_impl="local",
    position_embedding_type="rope",
)


def initialize_megatron(**_):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--tensor-model-parallel-size", type=int)
    parser.parse_known_args(sys.argv[1:], _ARGS)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(_ARGS.tensor_model_parallel_size)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)


def get_args():
    return _ARGS


def get_tokenizer():
    return Bytes()


def get_model(provider, wrap_with_ddp):
    return [provider()]


class Bytes:
    eod = 0

    def tokenize(self, text):
        return list(text.encode())

    def detokenize(self, tokens):
        return bytes(tokens).decode()
