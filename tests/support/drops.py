# SPDX-License-Identifier: Apache-2.0
"""What tests of `megatron-comp drop` share: a small model, its blocks, and its command line."""

import torch
from characters import character_llama
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp import cli
from megatron_comp.inference import hf
from megatron_comp.inference.generate import logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.spd.block import stream

RANKS, LAYERS = 2, 2
IDS = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(3))
LENGTH = ("--tokens", 96, "--context", 24)


def small_llama(folder):
    """2 layers, 8 query heads over 4 key-value heads."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12}
    return character_llama(folder, num_hidden_layers=LAYERS, **heads)


def streamed(folder, layers=(1,), ids=IDS):
    config = hf.read_config(folder)
    with hf.Checkpoint(folder) as checkpoint:
        return list(stream(checkpoint, config, ids, layers))


def main_of_rank(rank, world_size, argv):
    """Several ranks run the command as one that a launcher has started."""
    return cli.main(argv)


def command(ranks, *argv):
    argv = ["drop", *map(str, argv)]
    if ranks == 1:
        return cli.main(argv)
    assert run_ranks(main_of_rank, ranks, argv, init=False) == [0] * ranks
    return 0


def distilled(llama, text, folder, listed, out, *more):
    options = ("--epochs", 3, "--batch", 2, "--learning-rate", 3e-3, "--out", folder / out)
    return command(1, "distill", "--model", llama, "--tp", RANKS, *text, "--blocks", listed, *options, *more)


def logits_with_weights(rank, world_size, folder, file, words):
    """Logits of the stock model; of one with weights of a file; both with a policy."""
    init_parallel(world_size)
    made = []
    for extra in (None, file):
        model = build_model(folder, extra_weights=extra)
        made.append(logits(model, IDS, gather=True))
        made.append(logits(mc.apply_compression(model, mc.CompressionPolicy(layers=words)), IDS, gather=True))
    return made
