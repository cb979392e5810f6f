# SPDX-License-Identifier: Apache-2.0
"""The exchange of candidates in decode: greedy and top-k decoding take from it what they take from all logits."""

import pytest
import torch
import torch.distributed as dist
from checkpoints import tiny_llama
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.module import Float16Module
from models import inside_view, message_of, policy
from ranks import run_ranks
from torch_mamba import mamba_model

import megatron_comp as mc
from megatron_comp.inference import cpu
from megatron_comp.inference.generate import generate
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers.logits import LogitsGather, gathers
from megatron_comp.layers.reducer import Phase

VOCABULARY = 131  # 132 with padding at TP 2 and 3
PROMPT, NEW, LAYERS = list(range(1, 12)), 6, 2
STOCK = "none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(
        tmp_path_factory.mktemp("llama"),
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=6,
        head_dim=8,
        vocab_size=VOCABULARY,
    )


def gathered(logits, candidates, phase="decode", vocabulary=None):
    """All ranks' `logits` through the exchange, and what it counted."""
    gather = LogitsGather(candidates, vocabulary, dist.group.WORLD, Phase(phase))
    return gather(logits.clone()), gather.meter.stats


def exchanges(rank, world_size):
    cpu.prepare()
    made = {}
    generator = torch.Generator().manual_seed(0)
    width = 40
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        # Of few different values: many ties, within ranks and between them.
        whole = torch.randint(-6, 6, (5, 3, world_size * width), generator=generator).to(dtype)
        mine = whole[..., rank * width : (rank + 1) * width]
        made[name] = whole, {k: gathered(mine, k) for k in (1, 2, 7)}
    # Tokens end in the middle of the last rank's part; all that follows is larger than any token.
    whole = torch.randn(4, 1, world_size * width, generator=generator) - 100
    whole[..., -width // 2 :] = 0
    whole[0, 0, -width // 2 - 1] = -1
    mine = whole[..., rank * width : (rank + 1) * width]
    made["padded"] = whole, gathered(mine, 3, vocabulary=world_size * width - width // 2)
    made["empty rank"] = whole, gathered(mine, 3, vocabulary=(world_size - 1) * width)
    # More equal maxima than candidates.
    whole = torch.zeros(2, 1, world_size * width)
    whole[1, 0, : width // 2] = -1
    made["equal"] = whole, gathered(whole[..., rank * width : (rank + 1) * width], 2)
    whole = torch.randn(4, 1, world_size * width, generator=generator)
    whole[0, 0, 7] = whole[1, 0, world_size * width - 2] = torch.nan
    mine = whole[..., rank * width : (rank + 1) * width]
    made["nan"] = whole, gathered(mine, 3)
    made["prefill"] = whole, gathered(mine, 3, phase="prefill")
    made["as many"] = whole, gathered(mine, 20)
    made["gradients"] = whole, gathered(mine.clone().requires_grad_(), 3)
    return made


@pytest.fixture(scope="module", params=[2, 3])
def exchanged(request):
    return request.param, run_ranks(exchanges, request.param)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_greedy_and_top_k_take_the_same(exchanged, dtype, count):
    ranks, everyones = exchanged
    for made in everyones:
        whole, runs = made[dtype]
        out, stats = runs[count]
        assert torch.equal(out, everyones[0][dtype][1][count][0])
        assert (out.dtype, out.shape, out.is_contiguous()) == (whole.dtype, whole.shape, True)
        assert torch.equal(out.argmax(-1), whole.argmax(-1))
        assert torch.equal(out.topk(count).values, whole.topk(count).values)
        sent = out != -torch.inf
        assert torch.equal(out[sent], whole[sent])
        assert torch.equal(sent.view(5, 3, ranks, -1).sum(-1), torch.full((5, 3, ranks), count))
        rows, message = 15, 15 * count * (whole.element_size() + 4)
        assert (stats.site, stats.layer, stats.kept.calls, dict(stats.algorithms)) == (
            "logits",
            None,
            0,
            {"candidates": 1},
        )
        assert (stats.compressed.calls, stats.compressed.values) == (1, rows * ranks * 40)
        assert (stats.compressed.message_bytes, stats.compressed.received_bytes) == (
            ranks * message,
            (ranks - 1) * message,
        )


def test_padding_is_no_candidate(exchanged):
    ranks, everyones = exchanged
    for made in everyones:
        whole, (out, _) = made["padded"]
        tokens = whole.shape[-1] - 20
        assert (out[..., tokens:] == -torch.inf).all()
        assert torch.equal(out.argmax(-1), whole[..., :tokens].argmax(-1))
        assert out[0, 0].argmax() == tokens - 1
        assert torch.equal(out.topk(3).values, whole[..., :tokens].topk(3).values)
        whole, (out, _) = made["empty rank"]
        assert torch.equal(out.argmax(-1), whole[..., :-40].argmax(-1))


def test_the_first_of_equal_maxima_is_among_few_candidates(exchanged):
    for made in exchanged[1]:
        whole, (out, _) = made["equal"]
        assert torch.equal(out.argmax(-1), whole.argmax(-1))
        assert out.argmax(-1).tolist() == [[0], [20]]


def test_nan_arrives(exchanged):
    for made in exchanged[1]:
        whole, (out, _) = made["nan"]
        assert torch.equal(out.isnan(), whole.isnan())
        assert torch.equal(out.max(-1).values.isnan(), whole.max(-1).values.isnan())


@pytest.mark.parametrize(
    "name, reason", [("prefill", "prefill"), ("as many", "as many bytes"), ("gradients", "gradients")]
)
def test_all_logits_are_gathered(exchanged, name, reason):
    ranks, everyones = exchanged
    for made in everyones:
        whole, (out, stats) = made[name]
        assert torch.equal(out.nan_to_num(9), whole.nan_to_num(9))
        assert stats.kept_because == {reason: 1} and stats.compressed.calls == 0
        assert stats.kept.message_bytes == whole.nbytes
        assert stats.kept.received_bytes == (ranks - 1) * whole.nbytes // ranks


def decode(rank, world_size, folder):
    init_parallel(world_size)
    model, made = build_model(folder), {}
    generate(model, PROMPT, NEW)
    before = inside_view(model)
    mc.apply_compression(model, policy(codec=STOCK))
    made["stock"] = generate(model, PROMPT, NEW).tokens, mc.stats(model)
    for count in (1, 4, 10_000):
        mc.apply_compression(model, policy(codec=STOCK, logits=count))
        made[count] = generate(model, PROMPT, NEW).tokens, mc.stats(model)
    mc.apply_compression(model, policy(codec=STOCK, logits=4), timing=True)
    generate(model, PROMPT, NEW)
    made["timed"] = mc.stats(model)
    # A forward without a context is a prefill: nothing is missing from it.
    context = StaticInferenceContext(2, 16)
    steps = {}
    for name, seam in (("ours", True), ("theirs", False)):
        mc.apply_compression(model, policy(codec=STOCK, logits=4 if seam else None))
        context.reset()
        steps[name] = two_steps(model, context)
    made["steps"] = steps
    mc.remove_compression(model)
    made["restored"] = inside_view(model) == before and "forward" not in vars(model.output_layer)
    half = build_model(folder, dtype=torch.bfloat16)
    wrapped = Float16Module(half.config, half)
    context.reset()
    mc.apply_compression(wrapped, policy(codec=STOCK, logits=4))
    with torch.no_grad():
        made["wrapped"] = two_steps(wrapped, StaticInferenceContext(2, 16)), mc.stats(wrapped)
    mc.remove_compression(half)
    half.output_layer = torch.nn.Linear(96, VOCABULARY)
    made["other layer"] = message_of(mc.apply_compression, half, policy(logits=4))
    del half.output_layer
    made["no layer"] = message_of(mc.apply_compression, half, policy(logits=4))
    return made


def two_steps(model, context):
    """Logits of two prompts, and of two tokens after them."""
    made = []
    with torch.no_grad():
        for ids in (torch.arange(2, 16).view(2, 7), torch.tensor([[5], [90]])):
            positions = torch.arange(ids.shape[1])[None] + context.sequence_len_offset
            made.append(model(ids, positions, None, inference_context=context, runtime_gather_output=True))
            context.increment_sequence_len_offset(ids.shape[1])
            context.enable_decode_mode()
    return made


@pytest.fixture(scope="module", params=[1, 2, 3])
def decoded(request, folder):
    return request.param, run_ranks(decode, request.param, folder)


@pytest.mark.parametrize("count", [1, 4, 10_000])
def test_generated_tokens_are_those_of_all_logits(decoded, count):
    ranks, everyones = decoded
    for made in everyones:
        assert made[count][0] == made["stock"][0] == everyones[0]["stock"][0]
        (site,) = [site for site in made[count][1].sites if site.site == "logits"]
        if ranks == 1:
            assert site.kept_because == {"one rank": NEW}
        elif count == 10_000:
            assert site.kept_because == {"prefill": 1, "as many bytes": NEW - 1}
            rows = {NEW, NEW - 1 + len(PROMPT)}  # Megatron-Core 0.19 has logits of the whole prompt here
            assert site.kept.received_bytes in {row * (ranks - 1) * 132 // ranks * 4 for row in rows}
        else:
            assert site.kept_because == {"prefill": 1} and site.compressed.calls == NEW - 1
            assert site.compressed.received_bytes == (NEW - 1) * (ranks - 1) * count * 8


def test_without_the_key_logits_are_no_site(decoded):
    for made in decoded[1]:
        assert [site.site for site in made["stock"][1].sites] == ["attention", "mlp"] * LAYERS


def test_seconds_are_counted(decoded):
    for made in decoded[1]:
        site = made["timed"].sites[-1]
        assert site.site == "logits" and site.kept.seconds > 0
        assert decoded[0] == 1 or site.compressed.seconds > 0


def test_each_row_of_a_batch_has_its_candidates(decoded):
    ranks, everyones = decoded
    for made in everyones:
        (prompt, step), (stock_prompt, stock_step) = made["steps"]["ours"], made["steps"]["theirs"]
        assert torch.equal(prompt, stock_prompt)
        assert step.shape == stock_step.shape == (2, 1, stock_step.shape[-1])
        assert torch.equal(step.topk(4).values, stock_step.topk(4).values)
        assert torch.equal(step.topk(4).indices, stock_step.topk(4).indices)
        assert (step > -torch.inf).sum() == (8 * ranks if ranks > 1 else stock_step.numel())
        outs, stats = made["wrapped"]
        assert ranks == 1 or (stats.sites[-1].compressed.calls, stats.sites[-1].kept_because) == (1, {"prefill": 1})


def test_removing_restores(decoded):
    assert all(made["restored"] for made in decoded[1])


def test_models_without_such_logits_are_refused(decoded):
    for made in decoded[1]:
        assert "policy: logits: Linear is an output layer whose logits cannot be had in parts" in made["other layer"]
        assert "policy: logits: the model has no output layer" in made["no layer"]


def kinds_of_models(rank, world_size, folders):
    """kind -> all logits, and those of which each rank sent four, of eight tokens that count as decoded."""
    init_parallel(world_size)
    ids, made = torch.arange(16).view(2, 8), {}
    for name, model in (
        ("tied embeddings", build_model(folders["tied"])),
        ("sequence parallelism", build_model(folders["untied"], sequence_parallel=True)),
        ("tied, sequence parallelism", build_model(folders["tied"], sequence_parallel=True)),
        ("mamba", mamba_model(VOCABULARY - 1).eval()),
    ):
        made[name] = []
        for count in (None, 4):
            mc.apply_compression(model, policy(codec=STOCK, logits=count))
            model.compression_hook.remove()  # it would call a forward without a context a prefill
            for gather in gathers(model):
                gather.phase.name = "decode"
            with torch.no_grad():
                made[name].append(model(ids, ids, None, runtime_gather_output=True))
        made[name].append(mc.stats(model).sites[-1])
    return made


@pytest.fixture(scope="module")
def kinds(folder, tmp_path_factory):
    tied = tiny_llama(tmp_path_factory.mktemp("tied"), num_hidden_layers=1, vocab_size=130, tie_word_embeddings=True)
    return run_ranks(kinds_of_models, 2, {"tied": tied, "untied": folder})


@pytest.mark.parametrize("name", ["tied embeddings", "sequence parallelism", "tied, sequence parallelism", "mamba"])
def test_kinds_of_models(kinds, name):
    if name == "mamba":
        pytest.importorskip("einops", reason="Megatron's Mamba mixer needs it")
    for made in kinds:
        stock, ours, site = made[name]
        assert torch.equal(ours.argmax(-1), stock[..., :VOCABULARY].argmax(-1))
        assert torch.equal(ours.topk(4).values, stock[..., :VOCABULARY].topk(4).values)
        assert (ours > -torch.inf).sum() == 2 * 8 * 2 * 4
        assert (site.site, dict(site.algorithms), site.kept.calls) == ("logits", {"candidates": 1}, 0)
