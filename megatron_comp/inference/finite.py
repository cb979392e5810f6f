# SPDX-License-Identifier: Apache-2.0
"""Logits that are not finite are an error, which says where the model stopped being finite."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from ..layers.apply import stats
from . import stages


class NotFiniteError(ValueError):
    """Infinities or NaN among logits."""


class Origin(NamedTuple):
    """Where the first value came from that is not finite. order: the stage, and how many of its modules had run."""

    order: tuple[int, int]
    module: str
    dtype: str
    weight: str | None
    """The name of a weight in that module that is not finite itself."""

    def __str__(self) -> str:
        said = f"{_place(self.module)} ({self.module}), in {self.dtype}"
        return f"{said}: its {self.weight} is not finite" if self.weight else said


def check(model: GPTModel, logits: Tensor | None, forward: Callable[[], object]) -> None:
    """Raises NotFiniteError, on every rank, if logits are not finite on one. All ranks call this together.

    logits: this rank's; None in stages that have none. forward: runs the model on the same tokens again, to find where
    it began.
    """
    good = torch.ones((), dtype=torch.bool) if logits is None else torch.isfinite(logits).all()
    if (group := model.pg_collection.mp).size() > 1:
        good = good.to(next(model.parameters()).device, torch.int32)
        dist.all_reduce(good, dist.ReduceOp.MIN, group=group)
    if not good:
        fail(model, forward)


def fail(model: GPTModel, forward: Callable[[], object]) -> NoReturn:
    """Raises NotFiniteError that says where it began. All ranks call this together."""
    raise NotFiniteError(_message(model, _first(model, forward)))


def _first(model: GPTModel, forward: Callable[[], object]) -> Origin | None:
    """The earliest on any rank; None if this time all is finite."""
    seen, found, stage = 0, [], model.pp_group.rank()

    def watch(name: str):
        def look(module: torch.nn.Module, _args, output) -> None:
            nonlocal seen
            seen += 1
            bad = None if found else next((t for t in _tensors(output) if not torch.isfinite(t).all()), None)
            if bad is not None:
                weights = (key for key, weight in module.named_parameters() if not torch.isfinite(weight).all())
                found.append(Origin((stage, seen), name, str(bad.dtype).removeprefix("torch."), next(weights, None)))

        return look

    named = [(_in_whole(model, name), module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(watch(name)) for name, module in named]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    group = model.pg_collection.mp
    everybodys = [None] * group.size()
    dist.all_gather_object(everybodys, found, group=group)
    origins = [origin for each in everybodys for origin in each]
    return min(origins, key=lambda origin: (origin.order, origin.weight is None), default=None)


def _in_whole(model: GPTModel, module: str) -> str:
    """A module's name in the whole model, of whose layers a stage has some."""
    words = module.split(".")
    if words[:2] == ["decoder", "layers"] and len(words) > 2:
        words[2] = str(int(words[2]) + stages.first_layer(model))
    return ".".join(words)


def _tensors(output) -> Iterator[Tensor]:
    """Floating-point tensors in what a module returns."""
    for each in output if isinstance(output, (tuple, list)) else [output]:
        if torch.is_tensor(each) and each.is_floating_point():
            yield each


def _place(module: str) -> str:
    """`decoder.layers.1.mlp.linear_fc2` is in layer 1, mlp."""
    words = module.split(".")
    if words[:2] != ["decoder", "layers"] or len(words) < 3:
        return {"embedding": "the embedding", "output_layer": "the output layer"}.get(words[0], "the final norm")
    inside = words[3:]
    if inside[:1] in (["self_attention"], ["input_layernorm"]):
        site = "attention"
    elif "shared_experts" in inside:
        site = "shared_experts"
    else:
        site = "experts" if {"experts", "router"} & set(inside) else "mlp"
    return f"layer {words[2]}, {site}"


def _message(model: GPTModel, origin: Origin | None) -> str:
    dtype = str(model.config.params_dtype).removeprefix("torch.")
    advice = {"float16": ["--dtype bfloat16 or float32"], "bfloat16": ["--dtype float32"]}.get(dtype, [])
    if stats(model).compressed.calls:
        advice.append("another codec")
    if origin and origin.weight or not advice:
        advice.append("fetching the model again")
    began = f"it began in {origin}" if origin else f"in {dtype}; read at once, the same tokens give finite ones"
    return f"the model's logits are not finite: {began}. Try {', or '.join(advice)}"
