"""Compresses every language model that a program builds, without a change to the program.

The seam is the end of the outermost `__init__` of a `LanguageModule` (GPTModel, MambaModel and their kin): whichever
spec or provider the model came from, all its layers stand by then, while weights may still be loaded and the model
wrapped and moved, since compression leaves parameters and state dict as they are.
"""

import functools
import os
import sys

from megatron.core.models.common.language_module.language_module import LanguageModule

from ..policy import CompressionPolicy
from .apply import apply_compression, stats
from .places import find_places, reductions

_BUILDING = "_megatron_comp_building"


class Hook:
    """Applies a policy to every language model built while it is installed. `models`: those with something to sum."""

    def __init__(self, policy: CompressionPolicy) -> None:
        self.policy = policy
        self.models: list[LanguageModule] = []

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
        places = list(find_places(model))
        if not places:
            return  # a pipeline stage without layers
        apply_compression(model, self.policy)
        self.models.append(model)
        compressed = sum(bool(reduction.codec_names()) for reduction in reductions(model))
        self._say(f"{type(model).__name__}: {compressed} of {len(places)} sums compressed, policy {self.policy}")

    def report(self) -> str | None:
        """Says what was sent; what is wrong, if no model was built that sums anything."""
        if not self.models:
            return "no Megatron language model was built in this process: nothing was compressed"
        for model in self.models:
            done = stats(model)
            self._say(
                f"{type(model).__name__}: {done.compressed.calls} sums compressed, {done.kept.calls} kept "
                f"({dict(done.kept_because)}), {done.received_bytes:,d} bytes received"
            )
        return None

    def _say(self, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron_comp: {text}", file=sys.stderr, flush=True)


def _with_subclasses(cls: type):
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)
