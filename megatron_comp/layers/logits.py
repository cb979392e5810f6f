# SPDX-License-Identifier: Apache-2.0
"""The gather of vocabulary-parallel logits; in decode, of each rank's best candidates alone.

Every rank of a stock model receives all logits of the others. Greedy decoding needs the largest of them, sampling among
the k most likely tokens needs k. So each rank sends its K largest logits with their indices, and all other entries of
the gathered tensor are -inf: the largest, and the first of several that are equal, is that of the stock tensor. So are
the k largest for k <= K, up to logits of one rank that equal the k-th and have no place among its K.

Log-probabilities and nucleus sampling (top-p) read all logits, and would read wrong ones.
"""

from collections.abc import Iterator
from types import MethodType

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_tensor_model_parallel_region

from ..wire import exchange
from .meter import UNTIMED, Meter
from .plans import Choice
from .reducer import Phase
from .row_parallel import runs_forward_of

SITE = "logits"
INDEX = torch.int32


class LogitsGather:
    """Gathers the logits of one output layer over `group`.

    candidates: how many logits of each rank and row are sent in decode.
    vocabulary: entries from there on only pad the vocabulary, and are no candidates. Without it all entries are tokens.
    timing: the meter also takes seconds, for which every gather waits for the device.
    """

    def __init__(
        self,
        candidates: int,
        vocabulary: int | None,
        group: torch.distributed.ProcessGroup,
        phase: Phase,
        timing: bool = False,
    ) -> None:
        self.candidates, self.vocabulary, self.group, self.phase = candidates, vocabulary, group, phase
        self.meter = Meter(None, SITE, timing)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """`[..., V / N]`, this rank's part of the vocabulary, to `[..., V]`, equal on all ranks."""
        reason = self._stock_because(logits)
        ranks, sent = self.group.size(), self._message_bytes(logits) if not reason else logits.nbytes
        algorithm = None if reason else "candidates"
        choice = Choice(None, None, reason, ranks * logits.numel(), ranks * sent, (ranks - 1) * sent, algorithm)
        traffic = self.meter.record(choice, logits.is_cuda)
        with self.meter.clock(traffic) if self.meter.timing else UNTIMED:
            if reason:
                return gather_from_tensor_model_parallel_region(logits, group=self.group)
            return self._gather_candidates(logits)

    def _stock_because(self, logits: torch.Tensor) -> str:
        """Why all logits are gathered; empty where candidates are."""
        if self.group.size() == 1:
            return "one rank"
        if self.phase.name != "decode":
            return "prefill"
        if logits.requires_grad:
            return "gradients"
        return "" if self._message_bytes(logits) < logits.nbytes else "as many bytes"

    def _message_bytes(self, logits: torch.Tensor) -> int:
        """Of this rank's candidates."""
        return logits.shape[:-1].numel() * self.candidates * (logits.element_size() + INDEX.itemsize)

    def _gather_candidates(self, logits: torch.Tensor) -> torch.Tensor:
        ranks, width = self.group.size(), logits.shape[-1]
        rows = logits.reshape(-1, width)
        indices = _best(self._without_padding(rows), self.candidates)
        values = rows.gather(-1, indices)
        indices = (indices + self.group.rank() * width).to(INDEX)

        # Viewed as bytes, both travel in one message.
        message = torch.cat([each.reshape(-1).view(torch.uint8) for each in (indices, values)])
        gathered, work = exchange.all_gather(message, ranks, self.group, async_op=False)
        exchange.finish(work)

        everyones_indices, everyones_values = gathered.split([indices.nbytes, values.nbytes], dim=1)
        whole = rows.new_full((len(rows), ranks * width), -torch.inf)
        whole.scatter_(
            1,
            _by_row(everyones_indices, INDEX, ranks, self.candidates).long(),
            _by_row(everyones_values, values.dtype, ranks, self.candidates),
        )
        return whole.view(*logits.shape[:-1], ranks * width)

    def _without_padding(self, rows: torch.Tensor) -> torch.Tensor:
        """The logits `[rows, V / N]`, -inf where the vocabulary is padded."""
        if self.vocabulary is not None:
            tokens = max(self.vocabulary - self.group.rank() * rows.shape[-1], 0)
            rows[:, tokens:] = -torch.inf
        return rows


def attach(layer: ColumnParallelLinear, gather: LogitsGather) -> None:
    """Where the model asks the layer to gather its logits, `gather` does from now on."""
    layer.logits_gather = gather
    layer.forward = MethodType(_forward, layer)


def restore(module: torch.nn.Module) -> None:
    """The stock gather again, if this module has another one."""
    if vars(module).pop("logits_gather", None):
        del module.forward


def gathers(model: torch.nn.Module) -> Iterator[LogitsGather]:
    """Those in charge of a model's logits now."""
    return (vars(module)["logits_gather"] for module in model.modules() if "logits_gather" in vars(module))


def output_layers(model: torch.nn.Module) -> Iterator[tuple[ColumnParallelLinear, int | None]]:
    """A model's layers of logits, each with the size of the vocabulary without padding where the model tells it."""
    for module in model.modules():
        if (layer := getattr(module, "output_layer", None)) is not None:
            yield layer, getattr(getattr(module, "hf_config", None), "vocab_size", None)


def check_output_layers(model: torch.nn.Module, stages: int) -> None:
    """Raises ValueError if candidates of this model's logits cannot be gathered.

    In a pipeline of several stages one has logits, and the policy is one for all stages.
    """
    layers = [layer for layer, _ in output_layers(model)]
    if not layers and stages == 1:
        raise ValueError("policy: logits: the model has no output layer")
    for layer in layers:
        if not runs_forward_of(ColumnParallelLinear, layer):
            raise ValueError(
                f"policy: logits: {type(layer).__name__} is an output layer whose logits cannot be had in parts"
            )


def _forward(layer: ColumnParallelLinear, *args, **how):
    """In place of the layer's forward. What a compiler follows is stock."""
    gathers_logits = how.get("runtime_gather_output") and not torch.compiler.is_compiling()
    if gathers_logits:
        how["runtime_gather_output"] = False
    logits, bias = type(layer).forward(layer, *args, **how)
    return layer.logits_gather(logits) if gathers_logits else logits, bias


def _best(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `[rows, count]` of the largest values of each row, the first of equal maxima always among them."""
    first, best = rows.argmax(-1, keepdim=True), rows.topk(count).indices
    # Of more than `count` equal maxima, topk takes any.
    best[:, :1] = torch.where((best == first).any(-1, keepdim=True), best[:, :1], first)
    return best


def _by_row(gathered: torch.Tensor, dtype: torch.dtype, ranks: int, count: int) -> torch.Tensor:
    """Bytes `[ranks, rows x count values]` to `[rows, ranks x count]`."""
    return gathered.contiguous().view(dtype).view(ranks, -1, count).transpose(0, 1).flatten(1)
