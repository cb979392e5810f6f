"""A model beside its own uncompressed self, on a text."""

import torch
from tqdm import tqdm

from ..inference.generate import logits
from ..launcher import output
from ..layers.apply import remove_compression
from .metrics import Prediction, Quality


class Comparison:
    """windows: int64 `[windows, context]`; all but the first token of each are scored.

    Each rank keeps its part of the uncompressed model's log-probabilities, 4 bytes for each scored token and entry of
    its part of the vocabulary.
    """

    def __init__(self, model: torch.nn.Module, windows: torch.Tensor) -> None:
        self.model, self.windows = model, windows
        embedding = model.embedding.word_embeddings
        self._vocab_start, self._group = embedding.vocab_start_index, embedding.tp_group
        self._full: list[Prediction] = []

    @property
    def tokens(self) -> int:
        return len(self.windows) * (self.windows.shape[1] - 1)

    def measure_full(self) -> None:
        """Once, with the model's own weights: takes compression away."""
        if not self._full:
            remove_compression(self.model)
            self._full = [self._predict(window) for window in self._bar("uncompressed")]

    def quality(self, name: str) -> Quality:
        """Of the model as it stands. Raises RuntimeError without a `measure_full` before."""
        if not self._full:
            raise RuntimeError("measure_full() comes first")
        found = Quality()
        for window, full in zip(self._bar(name), self._full, strict=True):
            self._score(found, self._predict(window), full, window)
        return found

    def full_nll(self) -> float:
        """Of the uncompressed model, a token."""
        found = Quality()
        for window, full in zip(self.windows, self._full, strict=True):
            self._score(found, full, full, window)
        return found.nll / found.tokens

    def _score(self, found: Quality, said: Prediction, full: Prediction, window: torch.Tensor) -> None:
        found.add(said, full, window[1:].to(said.best.device), self._vocab_start, self._group)

    def _predict(self, window: torch.Tensor) -> Prediction:
        return Prediction.of(logits(self.model, window[None])[0, :-1], self._vocab_start, self._group)

    def _bar(self, name: str) -> tqdm:
        return tqdm(self.windows, name, disable=not output.is_first_rank())
