# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints on real Megatron-Core, against Hugging Face: every shape at every TP size it allows."""

import os
import signal
import time

import pytest
import torch
from models import message_of
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from megatron_comp.inference import hf
from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, destroy_parallel, init_parallel
from megatron_comp.inference.shards import check_tensor_parallel

# TP -> the shapes it fits
SIZES = {
    1: ["llama2", "llama3", "two_groups", "one_group"],
    2: ["llama2", "llama3", "two_groups"],
    3: ["llama3", "one_group"],
    4: ["llama2", "two_groups"],
}


def compare(rank, world_size, references):
    """name -> measures of plain, sequence-parallel and generated output against the reference."""
    init_parallel(world_size)
    init_parallel(world_size)  # a second call changes nothing
    measures = {}
    for name, ref in references.items():
        for sequence_parallel in (False, True):
            model = build_model(ref.folder, sequence_parallel=sequence_parallel)
            assert model.config.sequence_parallel == (sequence_parallel and world_size > 1)
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            gathered, part = logits(model, ref.ids, gather=True), logits(model, ref.ids)
            start = model.embedding.word_embeddings.vocab_start_index
            assert torch.equal(part, gathered[..., start : start + part.shape[-1]])
            widths = [None] * world_size
            torch.distributed.all_gather_object(widths, part.shape[-1])
            made = generate(model, ref.prompt, len(ref.tokens))
            measures[name, sequence_parallel] = {
                "shape": gathered.shape,
                "width": sum(widths),
                "difference": (gathered - ref.logits).abs().max().item(),
                "tokens": made.tokens,
            }
    destroy_parallel()
    destroy_parallel()
    return measures


@pytest.mark.parametrize("tp", SIZES)
def test_equals_hugging_face(tiny, tp):
    references = {name: tiny[name] for name in SIZES[tp]}
    for rank in run_ranks(compare, tp, references):
        for (name, sequence_parallel), got in rank.items():
            ref, where = references[name], f"{name} sequence_parallel={sequence_parallel}"
            assert got["shape"] == ref.logits.shape and got["width"] == ref.logits.shape[-1], where
            assert got["difference"] < 1e-4, where
            assert got["tokens"] == ref.tokens, where


def test_references_are_sharp(tiny):
    """What the comparison above relies on: logits of order one, and scaled frequencies that matter."""
    for ref in tiny.values():
        assert ref.logits.std() > 0.5
        assert len(set(ref.tokens)) > 3
    for name in ("llama3", "one_group"):
        config = hf.read_config(tiny[name].folder)
        config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
        unscaled = AutoModelForCausalLM.from_pretrained(tiny[name].folder, config=config, dtype=torch.float32)
        with torch.no_grad():
            assert (unscaled(tiny[name].ids).logits - tiny[name].logits).abs().max() > 0.1


@pytest.mark.parametrize(
    "name, tp, message",
    [
        ("llama2", 3, r"tensor_parallel 3 does not divide 4 attention heads; this model allows \[1, 2, 4\]"),
        (
            "llama3",
            4,
            r"4 is neither a multiple nor a divisor of 6 key-value heads; .* \[1, 2, 3, 6, 12\]",
        ),
        ("llama2", 0, "0 is less than 1"),
    ],
)
def test_sizes_that_do_not_fit(tiny, name, tp, message):
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(hf.read_config(tiny[name].folder), tp)


def test_other_numbers_that_do_not_divide(tiny):
    config = hf.read_config(tiny["llama2"].folder)
    config.intermediate_size = 97
    with pytest.raises(ValueError, match=r"2 does not divide intermediate_size 97; this model allows \[1\]"):
        check_tensor_parallel(config, 2)
    config = hf.read_config(tiny["one_group"].folder)
    config.head_dim = 10
    with pytest.raises(ValueError, match="3 does not divide the 80 rows of the fused query, key and value projection"):
        check_tensor_parallel(config, 3)


def start_badly(rank, world_size, folder):
    messages = [message_of(init_parallel, 3)]
    init_parallel(world_size, timeout_seconds=30)
    messages.append(message_of(build_model, folder))
    messages.append(message_of(build_model, folder, max_sequence_length=1000))
    messages.append(message_of(init_parallel, 3))
    return messages


def test_every_rank_says_what_is_wrong(tiny):
    for wrong_world, wrong_split, wrong_length, wrong_again in run_ranks(
        start_badly, 5, tiny["llama2"].folder, init=False
    ):
        assert "tensor_parallel is 3, but 5 rank(s) were started" in wrong_world
        assert "torchrun --nproc-per-node 3" in wrong_world
        assert wrong_split == "tensor_parallel 5 does not divide 4 attention heads; this model allows [1, 2, 4]"
        assert wrong_length == wrong_split
        assert wrong_again == wrong_world


def without_launcher(rank, world_size, folder):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    told = message_of(init_parallel, 2)
    init_parallel(1)
    too_long = message_of(build_model, folder, max_sequence_length=257)
    short = build_model(folder, max_sequence_length=16)
    return told, too_long, short.max_sequence_length


def test_one_rank_needs_no_launcher(tiny):
    ((told, too_long, length),) = run_ranks(without_launcher, 1, tiny["llama2"].folder, init=False)
    assert "tensor_parallel is 2, but 1 rank(s) were started" in told
    assert too_long == "max_sequence_length is 257, this model allows 1 to 256"
    assert length == 16


def lose_a_rank(rank, world_size, folder, timeout_seconds, how):
    init_parallel(world_size, timeout_seconds)
    model = build_model(folder)

    def leave(*_):
        if how == "hang":
            time.sleep(timeout_seconds + 8)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        model.decoder.layers[1].mlp.register_forward_pre_hook(leave)
    torch.distributed.barrier()
    start = time.monotonic()
    try:
        generate(model, [1, 2, 3], 4)
    except RuntimeError:
        return time.monotonic() - start
    return None


@pytest.mark.parametrize("how", ["killed", "hang"])
def test_a_lost_rank_ends_the_others_in_time(tiny, how):
    timeout = 6
    seconds = run_ranks(lose_a_rank, 3, tiny["llama3"].folder, timeout, how, init=False, may_die=(1,))
    assert seconds[1] is None
    for rank in (0, 2):
        assert seconds[rank] is not None, "no error on a live rank"
        assert seconds[rank] < timeout + 6
