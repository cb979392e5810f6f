# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench codec` times nothing whose bytes are wrong, and peers pass the same check or give no row."""

import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch

from megatron_comp.bench import equality, peers, timing
from megatron_comp.wire import backends, reference
from megatron_comp.wire.codec import Codec

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--backend", "reference", "--shape", "4x64", "--repeats", "2", "--ranks", "2"]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def flips_a_bit(out, _before):
    out[70] ^= 4


def skips_the_end(out, before):
    out[-16:] = before[-16:]


@pytest.mark.parametrize("harm, first", [(flips_a_bit, "70"), (skips_the_end, r"\d+")])
@pytest.mark.parametrize("op", ["encode", "decode_sum", "decode_sum_encode"])
def test_a_wrong_byte_is_refused(bench, error_line, monkeypatch, tmp_path, op, harm, first):
    def harmful(*arguments):
        out = arguments[-1].view(torch.uint8).view(-1)
        before = out.clone()
        assert before.eq(0xFF).all()  # else what is not written may be right by chance
        getattr(reference, op)(*arguments)
        harm(out, before)

    functions = {name: getattr(reference, name) for name in ("encode", "decode_sum", "decode_sum_encode")}
    wrong = SimpleNamespace(**(functions | {op: harmful}))
    monkeypatch.setattr(backends, "available", lambda _: {"reference": reference, "wrong": wrong})
    monkeypatch.setattr(timing.WallClock, "round", lambda *_: pytest.fail("something was timed"))
    arguments = [*SMALL, "--backend", "wrong", "--codec", "mxfp8", "--csv", tmp_path / "rows.csv"]
    assert bench(*arguments) == 1
    line = error_line()
    expected = rf"fp8_e4m3:32:e8m0, {op} .*'wrong'.* byte is {first}, 0x\w\w where the reference has 0x\w\w"
    assert re.search(expected, line), line
    assert not (tmp_path / "rows.csv").exists()


class StaleOnReplay:
    """Right when called, but what a CUDA graph of it holds is the first answer, whatever the input becomes."""

    def __init__(self):
        self.first = None

    def encode(self, x, fmt, out):
        if self.first is None:
            reference.encode(x, fmt, out)
            self.first = out.clone()
        out.copy_(self.first)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_that_ignores_its_input_is_refused():
    device, partials = torch.device("cuda"), torch.randn(2, 8, 64)
    truth = equality.Truth.of(Codec.parse("mxfp4"), partials)
    equality.check("reference", reference, "encode", 1, truth, device)
    with pytest.raises(equality.WrongBytes, match="replayed in a CUDA graph"):
        equality.check("stale", StaleOnReplay(), "encode", 1, truth, device)


# Peers.


def test_the_eager_peer_passes_the_check_of_bytes():
    pytest.importorskip("torchao")
    truth = equality.Truth.of(Codec.parse("mxfp4"), torch.randn(2, 8, 64))
    equality.check("torchao", peers.Torchao(CPU), "encode", 1, truth, CPU)


def test_the_compiled_peer_passes_the_check_of_bytes(monkeypatch):
    """Without the compiler, whose start would take most of this file's time."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    peer = peers.TorchCompile(CPU)
    for name, (op, ranks) in itertools.product(("mxfp4", "mxfp8"), (("encode", 1), ("decode_sum", 3))):
        truth = equality.Truth.of(Codec.parse(name), torch.randn(3, 8, 64, dtype=torch.bfloat16))
        equality.check("torch.compile", peer, op, ranks, truth, CPU)


def test_peers_that_cannot_run_give_a_line_and_no_row(bench, capsys, monkeypatch, tmp_path):
    class Missing:
        def __init__(self, _device):
            import a_package_that_is_missing  # noqa: F401

    class Wrong:
        def __init__(self, _device):
            pass

        def encode(self, x, fmt, out):
            out.fill_(1)

    monkeypatch.setattr(peers, "PEERS", {"missing": Missing, "wrong": Wrong})
    arguments = [*SMALL, "--peers", "--codec", "mxfp4", "--codec", "nvfp4", "--json", tmp_path / "rows.json"]
    assert bench(*arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["backend"] for row in rows} == {"torch", "reference"}
    errors = capsys.readouterr().err
    assert "no row for peer missing: ModuleNotFoundError: No module named 'a_package_that_is_missing'" in errors
    assert "no row for peer wrong, encode mxfp4: WrongBytes:" in errors
    assert len(errors.splitlines()) == 2
