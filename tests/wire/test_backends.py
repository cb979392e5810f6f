# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a device."""

import oracles
import pytest
import torch

from megatron_comp.wire import backends, native, reference
from megatron_comp.wire.codec import Codec

REMEMBERED = (backends.choose_backend, backends.available, backends._warn_of_slow_codecs)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Choices are remembered for the life of a process."""
    monkeypatch.delenv(backends.OVERRIDE, raising=False)
    for function in REMEMBERED:
        function.cache_clear()
    yield
    for function in REMEMBERED:
        function.cache_clear()


@pytest.mark.skipif(native.compiler() is None, reason="needs a C compiler")
def test_native_is_the_choice_for_a_cpu():
    assert backends.choose_backend("cpu") is native


def test_triton_is_the_choice_for_a_gpu():
    gpu = pytest.importorskip("megatron_comp.wire.gpu")
    assert backends.choose_backend("cuda") is gpu
    assert list(backends.available("cuda")) == ["triton", "reference"]


@pytest.mark.parametrize("name", ["reference", "native"])
def test_the_environment_overrides(monkeypatch, name):
    monkeypatch.setenv(backends.OVERRIDE, name)
    assert backends.choose_backend("cpu") is backends.available("cpu")[name]


@pytest.mark.parametrize("name, device", [("fast", "cpu"), ("native", "cuda"), ("triton", "cpu")])
def test_an_override_that_cannot_be_followed_is_an_error(monkeypatch, name, device):
    monkeypatch.setenv(backends.OVERRIDE, name)
    allowed = {"cpu": "native, reference", "cuda": "triton, reference"}[device]
    with pytest.raises(ValueError, match=f"MEGATRON_COMP_BACKEND='{name}': allowed on {device} are {allowed}"):
        backends.choose_backend(device)


def test_without_a_compiler_one_warning(monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda: None)
    with pytest.warns(UserWarning, match="plain torch, .* times slower: no C compiler was found") as caught:
        assert backends.choose_backend("cpu") is reference
        backends.choose_backend.cache_clear()
        assert backends.choose_backend("cpu") is reference
    assert len(caught) == 1


def test_without_triton_one_warning(monkeypatch):
    def missing(*_):
        raise ImportError

    monkeypatch.setattr(backends, "import_module", missing)
    with pytest.warns(UserWarning, match="times slower: Triton 3.6 or newer cannot be imported") as caught:
        assert backends.choose_backend("cuda") is reference
    assert len(caught) == 1


def test_codecs_use_the_choice(monkeypatch):
    codec, x = Codec.parse("mxfp4"), oracles.random_tensor((3, 40))
    monkeypatch.setenv(backends.OVERRIDE, "reference")
    expected = codec.encode(x)
    backends.choose_backend.cache_clear()
    calls = []
    monkeypatch.delenv(backends.OVERRIDE)
    monkeypatch.setattr(native, "encode", lambda x, fmt, out: calls.append(fmt) or reference.encode(x, fmt, out))
    monkeypatch.setattr(native, "compiler", lambda: ("cc",))
    assert torch.equal(codec.encode(x), expected) and calls == [codec.format]


def warm_up(device):
    mxfp4 = Codec.parse("mxfp4").format
    backends.warm_up(backends.SumKind(mxfp4, mxfp4, torch.bfloat16, 64, 2, "two_step"), torch.device(device))


def test_nothing_is_compiled_later_for_a_cpu(monkeypatch):
    gpu = pytest.importorskip("megatron_comp.wire.gpu")
    monkeypatch.setattr(gpu, "warm_up", None)
    warm_up("cpu")


def test_a_compiler_that_fails_is_one_clear_error(monkeypatch):
    gpu = pytest.importorskip("megatron_comp.wire.gpu")

    def failing(*_):
        raise OSError("no such thing as gcc")

    monkeypatch.setattr(gpu, "warm_up", failing)
    with pytest.raises(RuntimeError, match="codec fp4_e2m1:32:e8m0 .*: OSError: no such thing.* needs a C compiler"):
        warm_up("cuda")
