"""Compresses every language model that a program builds, without a change to the program.

The seam is the end of the outermost `__init__` of a `LanguageModule` (GPTModel, MambaModel and their kin): whichever
spec or provider the model came from, all its layers stand by then, while weights may still be loaded and the model
wrapped and moved, since compression leaves parameters and state dict as they are.
"""

import functools
import os
import sys

from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule

from ..policy import CompressionPolicy
from .apply import apply_compression, stats
from .places import find_places, reducers

_BUILDING = "_megatron_comp_building"


class Hook:
    """Applies a policy to every language model built while it is installed. `models`: those with something to sum."""

    def __init__(self, policy: CompressionPolicy) -> None:
        self.policy = policy
        self.models: list[LanguageModule] = []
        self._only_an_end = False  # a pipeline stage without layers was built
        self._speaks = os.environ.get("RANK", "0") == "0"

    def install(self) -> None:
        """From now on, for all classes that there are and those still to come. Once a process."""

        def watched_from_birth(cls, **kwargs) -> None:
            super(LanguageModule, cls).__init_subclass__(**kwargs)
            self._watch(cls)

        LanguageModule.__init_subclass__ = classmethod(watched_from_birth)
        for cls in _with_subclasses(LanguageModule):
            self._watch(cls)

    def _watch(self, cls: type) -> None:
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

    def _built(self, model: LanguageModule) -> None:
        self._speaks = _speaks_for_its_stage()  # a script may take Megatron's groups down before the report
        places = list(find_places(model))
        if not places:
            self._only_an_end |= model.config.pipeline_model_parallel_size > 1
            return
        apply_compression(model, self.policy)
        self.models.append(model)
        compressed = sum(bool(reducer.codecs) for reducer in reducers(model))
        self._say(f"{type(model).__name__}: {compressed} of {len(places)} sums compressed, policy {self.policy}")

    def report(self) -> str | None:
        """Says what was sent; what is wrong, if no model was built that sums anything."""
        if not self.models and not self._only_an_end:
            return "no Megatron language model was built in this process: nothing was compressed"
        what = "sums" if self.policy.logits is None else "sums and gathers of logits"
        for model in self.models:
            done = stats(model)
            self._say(
                f"{type(model).__name__}: {done.compressed.calls} {what} compressed, {done.kept.calls} kept "
                f"({dict(done.kept_because)}), {done.received_bytes:,d} bytes received"
                + (", not counting replays of CUDA graphs" if done.captured else "")
            )
        return None

    def _say(self, text: str) -> None:
        if self._speaks:
            print(f"megatron_comp: {text}", file=sys.stderr, flush=True)


def _speaks_for_its_stage() -> bool:
    """One rank of each pipeline stage says what was done there; of a program without Megatron's groups, rank 0."""
    if not parallel_state.model_parallel_is_initialized():
        return os.environ.get("RANK", "0") == "0"
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return parallel_state.get_tensor_model_parallel_rank() == replica == 0


def _with_subclasses(cls: type):
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)
