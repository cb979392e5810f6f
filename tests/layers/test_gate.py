# SPDX-License-Identifier: Apache-2.0
"""`min_bytes: auto` and `algorithm: auto` by calibration files, on real ranks: what is kept, on all ranks alike."""

import os

import pytest
import torch
from models import LAYERS, all_logits, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.generate import generate
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers.agreement import say_calibration
from megatron_comp.wire.calibration import LINKS, VARIABLE, Calibration, CodecCost, Link
from megatron_comp.wire.codec import Codec

RANKS = 2
PROMPT, NEW = list(range(1, 40)), 3
ONE = 2 * LAYERS  # calls of a forward


def calibration(rate, latency=1e-6, ranks=RANKS, encode_fixed_s=0.0):
    """Codecs that take a nanosecond a value, on links of a rate."""
    cost = CodecCost(encode_fixed_s, 1e-9, 0.0, 1e-9)
    return Calibration(
        dict.fromkeys(LINKS, Link(rate, latency)),
        {str(Codec.parse("mxfp4")): cost},
        0.1,
        {"ranks": ranks, "hosts": 1, "backend": "gloo", "device": "cpu"},
    )


# name -> file; the stock prefill of 39 tokens of 96 fp32 values takes 15 KB, a decoded token 384 bytes.
FILES = {
    "slow": calibration(1e5),
    "fast": calibration(1e12),
    # To encode takes 5 us before it starts, as 1200 bytes do here: a token's message cannot save that.
    "middle": calibration(2.4e8, encode_fixed_s=5e-6),
    # Two phases cost a start more, and at N=2 as many bytes.
    "two_starts": calibration(1e5, latency=1.0),
}


def gate(rank, world_size, folder, files):
    init_parallel(world_size)
    model, made = build_model(folder), {}
    for name in FILES:
        # Only rank 0 has the file, as on a cluster where the others do not see its disk.
        os.environ[VARIABLE] = f"{files}/{name}.yaml" if rank == 0 else f"{files}/nowhere.yaml"
        mc.apply_compression(model, policy(min_bytes="auto"))
        generate(model, PROMPT, NEW)
        made[name] = mc.stats(model)
    os.environ[VARIABLE] = f"{files}/fast.yaml"
    mc.apply_compression(model, policy(min_bytes=0))
    generate(model, PROMPT, NEW)
    made["explicit"] = mc.stats(model)
    mc.apply_compression(model, policy(min_bytes="auto"))
    kept = all_logits(model)
    mc.remove_compression(model)
    made["bits"] = torch.equal(kept, all_logits(model))
    for name in ("broken", "three", "nowhere"):
        os.environ[VARIABLE] = f"{files}/{name}.yaml" if rank == 0 else f"{files}/slow.yaml"
        try:
            mc.apply_compression(model, policy(min_bytes="auto"))
            made[name] = "no error"
        except ValueError as error:
            made[name] = str(error)
        mc.apply_compression(model, policy(min_bytes=0, algorithm="two_step"))  # predicts nothing, reads nothing
        mc.apply_compression(model, mc.CompressionPolicy())
    return made


@pytest.fixture(scope="module")
def gated(llama, tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    for name, made in FILES.items():
        made.write(files / f"{name}.yaml")
    calibration(1e5, ranks=3).write(files / "three.yaml")
    (files / "broken.yaml").write_text("schema: 1\nspeed: 5\n")
    return run_ranks(gate, RANKS, llama, str(files))


SLOWER = "predicted slower"


@pytest.mark.parametrize(
    "name, compressed, kept",
    [
        ("slow", NEW * ONE, {}),
        ("fast", 0, {SLOWER: NEW * ONE}),
        ("explicit", NEW * ONE, {}),
    ],
)
def test_slow_links_compress_and_fast_ones_do_not(gated, name, compressed, kept):
    for made in gated:
        assert made[name].compressed.calls == compressed
        assert made[name].kept_because == kept


def test_a_link_between_keeps_small_messages(gated):
    """As the arithmetic says, for the prompt's message and for a decoded token's."""
    for made in gated:
        stats = made["middle"]
        assert (stats.compressed.calls, stats.kept_because) == (ONE, {SLOWER: (NEW - 1) * ONE})
        assert stats.compressed.values == ONE * len(PROMPT) * 96


def test_auto_takes_the_algorithm_that_the_file_predicts_faster(gated):
    for made in gated:
        assert made["two_starts"].algorithms == {"gather_sum": ONE}


def test_what_is_kept_has_the_stock_bits(gated):
    assert all(made["bits"] for made in gated)


@pytest.mark.parametrize(
    "name, told",
    [
        ("broken", "broken.yaml: 'speed' is unknown"),
        ("three", "three.yaml was measured with 3 ranks, this group has 2"),
        ("nowhere", "nowhere.yaml"),
    ],
)
def test_every_rank_says_what_rank_0_could_not_read(gated, name, told):
    for made in gated:
        assert told in made[name]


def test_codecs_that_were_not_measured_are_named_in_one_line(caplog):
    words = policy(codec="mxfp4", sites={"mlp": "nvfp4"}, layers={1: "int8:32:fp16>mxfp4"})
    say_calibration(calibration(1e5), words, RANKS)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "has no time of " + ", ".join(sorted(map(str, map(Codec.parse, ("nvfp4", "int8:32:fp16"))))) + "," in warning
    caplog.clear()
    say_calibration(calibration(1e5), policy(codec="mxfp4"), RANKS)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
