# SPDX-License-Identifier: Apache-2.0
"""Compresses every language model that a program builds, without a change to the program.

The seam is the end of the outermost `__init__` of a `LanguageModule` (GPTModel, MambaModel and their kin): whichever
spec or provider the model came from, all its layers stand by then, while weights may still be loaded and the model
wrapped and moved, since compression leaves parameters and state dict as they are.
"""

import functools
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.models.vision.multimodal_projector import MultimodalProjector

from ..policy import CompressionPolicy
from .apply import apply_compression, counters, stats
from .meter import ModelStats
from .not_recognised import find_not_recognised, find_sums, shortened
from .places import find_places, numbered_layers, reducers

_BUILDING = "_megatron_comp_building"


class Hook:
    """Applies a policy to every language model built while it is installed, and says what they sent.

    What stands beside a language model is named and left: a policy is of one model's layers.
    """

    def __init__(self, policy: CompressionPolicy | Path) -> None:
        """policy: or its file, which `apply_compression` then reads."""
        self.policy = policy
        # Not the models themselves: they hold process groups, which a script that does not destroy them leaves to the
        # end of the interpreter. There a group that something of ours kept alive for longer aborts the process.
        self._models: list[tuple[str, weakref.ref[LanguageModule], ModelStats]] = []
        self._only_an_end = False  # a pipeline stage without layers was built
        self._unknown: str | None = None  # what was said of a model with layers, of whose sums none is recognised
        self._speaks = os.environ.get("RANK", "0") == "0"
        self._process, self._reported = os.getpid(), False

    def install(self) -> None:
        """From now on, for all classes that there are and those still to come. Once a process."""

        for base in (LanguageModule, VisionModule, MultimodalProjector):
            self._watch_all(base)

    # Classes are patched here, which no type checker follows: hence Any.
    def _watch_all(self, base: Any) -> None:
        def watched_from_birth(cls, **kwargs) -> None:
            super(base, cls).__init_subclass__(**kwargs)
            self._watch(cls)

        base.__init_subclass__ = classmethod(watched_from_birth)
        for cls in _with_subclasses(base):
            self._watch(cls)

    def _watch(self, cls: Any) -> None:
        if "__init__" not in cls.__dict__:
            return
        init = cls.__init__

        @functools.wraps(init)
        def watched(model, *args, **kwargs) -> None:
            outermost = _BUILDING not in model.__dict__
            object.__setattr__(model, _BUILDING, True)
            init(model, *args, **kwargs)
            if outermost:
                object.__delattr__(model, _BUILDING)
                self._built(model)

        cls.__init__ = watched

    def _built(self, model: torch.nn.Module) -> None:
        self._speaks = _speaks_for_its_stage()  # a script may take Megatron's groups down before the report
        if not isinstance(model, LanguageModule):
            if sums := find_sums(model):
                self._say(
                    f"{type(model).__name__}: {len(sums)} sums are not recognised and stay uncompressed: "
                    f"{shortened(sums)}"
                )
            return
        places = list(find_places(model))
        if not places:
            has_layers = any(numbered_layers(model))
            # Every rank of the job takes part. `CompressionPolicy()` asks nothing of a model that is not recognised.
            apply_compression(model, CompressionPolicy() if has_layers else self.policy)
            if has_layers:
                has = shortened(find_not_recognised(model)) or "no row-parallel linear at all"
                self._unknown = (
                    f"{type(model).__name__} was built, but none of its sums is recognised: nothing was compressed. It "
                    f"has {has}"
                )
            else:
                self._only_an_end |= model.config.pipeline_model_parallel_size > 1
            return
        apply_compression(model, self.policy)
        name, found = type(model).__name__, list(reducers(model))
        self._models.append((name, weakref.ref(model), ModelStats(counters(model))))
        compressed = sum(bool(reducer.codecs) for reducer in found)
        link = f"; {stats(model).link}" if stats(model).link else ""
        self._say(f"{name}: {compressed} of {len(places)} sums have a codec, policy {self.policy}{link}")

    def report(self) -> str | None:
        """Says what was sent, once; what is wrong, if no model was built that sums anything."""
        if self._reported or os.getpid() != self._process:  # a child that was forked has nothing to say of its own
            return None
        self._reported = True
        if not self._models and self._unknown:
            return self._unknown
        if not self._models and not self._only_an_end:
            return "no Megatron language model was built in this process: nothing was compressed"
        for name, reference, counted in self._models:
            model = reference()
            self._say(f"{name}: {counted if model is None else stats(model)}")
        return None

    def report_before_the_process_ends(self) -> None:
        """Also where SIGTERM or `os._exit` ends it, as servers and scripts with CUDA graphs do.

        The signal is left alone on ranks other than 0: a rank of a server waits for its requests inside of a
        collective, where no handler of Python's runs, and would no longer end.
        """
        leave = os._exit

        def report_and_leave(status: int) -> NoReturn:
            self.report()
            leave(status)

        os._exit = report_and_leave
        if self._speaks and threading.current_thread() is threading.main_thread():  # only that one may handle signals
            signal.signal(signal.SIGTERM, functools.partial(self._end_by_signal, signal.getsignal(signal.SIGTERM)))

    def _end_by_signal(self, previous, number: int, frame) -> None:
        self.report()
        signal.signal(number, previous)
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            os.kill(os.getpid(), number)

    def _say(self, text: str) -> None:
        if self._speaks:
            print(f"megatron_comp: {text}", file=sys.stderr, flush=True)


def _speaks_for_its_stage() -> bool:
    """One rank of each pipeline stage says what was done there; of a program without Megatron's groups, rank 0."""
    if not parallel_state.model_parallel_is_initialized():
        return os.environ.get("RANK", "0") == "0"
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return parallel_state.get_tensor_model_parallel_rank() == replica == 0


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    subclasses: list[type] = cls.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)
