# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode, small messages and seconds, as a model's own forwards show them; through wrappers too."""

import gc
import weakref

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.module import Float16Module
from models import HIDDEN, LAYERS, all_logits, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.generate import generate
from megatron_comp.inference.model import build_model, init_parallel


class Wrapper(torch.nn.Module):
    """Hands everything on, as the wrappers around a model do; `rename` as Megatron called the context before."""

    def __init__(self, module, rename=False):
        super().__init__()
        self.module, self.rename = module, rename

    def forward(self, *args, inference_context=None, **kwargs):
        if self.rename:
            return self.module(*args, inference_params=inference_context, **kwargs)
        return self.module(*args, inference_context=inference_context, **kwargs)


PROMPT, NEW = list(range(1, 14)), 5


def prefill_and_decode(model, positional=False):
    """Two forwards of a model that may be wrapped: of a prompt, and of one token."""
    context = StaticInferenceContext(1, 32)
    with torch.no_grad():
        for ids in (torch.tensor([PROMPT]), torch.tensor([[7]])):
            positions = torch.arange(ids.shape[1])[None] + context.sequence_len_offset
            if positional:
                model(ids, positions, None, None, None, context, runtime_gather_output=True)
            else:
                model(ids, positions, None, inference_context=context, runtime_gather_output=True)
            context.increment_sequence_len_offset(ids.shape[1])
            context.enable_decode_mode()


def phases(rank, world_size, folder):
    init_parallel(world_size)
    model, made = build_model(folder), {}
    for name, words in {
        "all": {},
        "prefill": {"phases": {"decode": "none"}},
        "decode": {"phases": {"prefill": "none"}},
        "own_codecs": {"phases": {"prefill": "mxfp8", "decode": "int8:32:fp16"}},
        "min_bytes": {"min_bytes": len(PROMPT) * HIDDEN * 4},
        "min_bytes_more": {"min_bytes": len(PROMPT) * HIDDEN * 4 + 1},
        "auto": {"min_bytes": "auto"},
    }.items():
        mc.apply_compression(model, policy(algorithm="gather_sum", **words), timing=name == "prefill")
        generate(model, PROMPT, NEW)
        made[name] = mc.stats(model)
    decode_stays_stock = policy(phases={"decode": "none"})
    # A forward without a context, after a decode: a prefill again.
    mc.apply_compression(model, decode_stays_stock)
    generate(model, PROMPT, 2)
    all_logits(model)
    made["then_whole"] = mc.stats(model)
    for name, wrapped, positional in (
        ("wrapper", Wrapper(model), False),
        ("old_name", Wrapper(Wrapper(model, rename=True)), False),
        ("positional", model, True),
        ("inside", Wrapper(Wrapper(model)), False),
    ):
        mc.apply_compression(wrapped, decode_stays_stock)
        prefill_and_decode(model if name == "inside" else wrapped, positional)
        made[name] = mc.stats(wrapped)
        mc.remove_compression(wrapped)
    half = build_model(folder, dtype=torch.bfloat16)
    wrapped = Float16Module(half.config, half)
    mc.apply_compression(wrapped, decode_stays_stock)
    prefill_and_decode(wrapped)
    made["float16"] = mc.stats(half)
    # Applied inside and out: removing outside leaves nothing inside.
    mc.apply_compression(half, policy())
    mc.remove_compression(wrapped)
    made["left"] = [len(module._forward_pre_hooks) for module in wrapped.modules() if module._forward_pre_hooks]
    linear = weakref.ref(half.decoder.layers[0].mlp.linear_fc2)
    gc.collect()
    gc.disable()
    del half, wrapped
    made["freed"] = linear() is None
    gc.enable()
    return made


@pytest.fixture(scope="module")
def phased(llama):
    return run_ranks(phases, 2, llama)


ONE = 2 * LAYERS  # calls of a forward
PREFILL, DECODE = ONE, ONE * (NEW - 1)


@pytest.mark.parametrize(
    "name, compressed, kept",
    [
        ("all", PREFILL + DECODE, {}),
        ("prefill", PREFILL, {"policy": DECODE}),
        ("decode", DECODE, {"policy": PREFILL}),
        ("own_codecs", PREFILL + DECODE, {}),
        ("min_bytes", PREFILL, {"min_bytes": DECODE}),
        ("min_bytes_more", 0, {"min_bytes": PREFILL + DECODE}),
        ("auto", 0, {"min_bytes": PREFILL + DECODE}),
        ("then_whole", 2 * ONE, {"policy": ONE}),
        ("wrapper", ONE, {"policy": ONE}),
        ("old_name", ONE, {"policy": ONE}),
        ("positional", ONE, {"policy": ONE}),
        ("inside", ONE, {"policy": ONE}),
        ("float16", ONE, {"policy": ONE}),
    ],
)
def test_phases_and_small_messages(phased, name, compressed, kept):
    for made in phased:
        assert made[name].compressed.calls == compressed
        assert made[name].kept_because == kept
        assert made[name].kept.calls == sum(kept.values())


def test_phases_count_the_values_of_their_own_tokens(phased):
    for made in phased:
        assert made["prefill"].compressed.values == ONE * len(PROMPT) * HIDDEN
        assert made["prefill"].kept.values == DECODE * HIDDEN
        assert made["decode"].compressed.values == DECODE * HIDDEN
        assert made["decode"].kept.values == ONE * len(PROMPT) * HIDDEN
        whole, single = mc.Codec.parse("mxfp8"), mc.Codec.parse("int8:32:fp16")
        assert made["own_codecs"].compressed.message_bytes == (
            PREFILL * whole.message_bytes((len(PROMPT), HIDDEN)) + DECODE * single.message_bytes((1, HIDDEN))
        )


def test_seconds_only_when_asked_for(phased):
    for made in phased:
        assert made["prefill"].compressed.seconds > 0 and made["prefill"].kept.seconds > 0
        assert made["all"].compressed.seconds is None and made["decode"].kept.seconds is None


def test_a_model_that_was_restored_is_freed_without_garbage_collection(phased):
    assert all(made["freed"] for made in phased)


def test_removing_outside_leaves_no_hook_inside(phased):
    assert all(made["left"] == [] for made in phased)
