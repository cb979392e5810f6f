# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens from a text."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..inference.text import read_text


@dataclass(frozen=True)
class Text:
    """The start of a text file: `tokens` of it, in whole windows of `context`."""

    file: str
    tokens: int
    context: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}, {self.tokens // self.context} windows of {self.context} tokens"

    def windows(self, tokenizer) -> torch.Tensor:
        """int64 `[windows, context]`. Raises ValueError that names `--text` if the file is too short or no text."""
        # The start of the file holds what is needed: no token is longer than a few dozen characters, few as long as 8.
        text = read_text(self.file)
        count = self.tokens // self.context * self.context
        ids = tokenizer.encode(text[: 8 * count])
        if len(ids) < count:
            ids = tokenizer.encode(text)
        if len(ids) < count:
            raise ValueError(f"--text {self.file} has {len(ids)} tokens, {count} are needed")
        return torch.tensor(ids[:count]).view(-1, self.context)
