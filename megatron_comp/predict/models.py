# SPDX-License-Identifier: Apache-2.0
"""Shapes of models: rows of data, or read from a Hugging Face config.json."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from ..files import read_json, shown


@dataclass(frozen=True)
class Model:
    """A Llama or Mixtral by its sizes. experts: of each layer, 0 for none; active: how many of them a token takes."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    active: int = 0

    @property
    def attention_weights(self) -> int:
        """Of one layer: query, key, value and output projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Of one layer's MLP, or of one expert: gate, up and down."""
        return 3 * self.hidden * self.ffn

    @property
    def multiplications(self) -> int:
        """Of a token in all layers, by all ranks together, but for attention's scores."""
        return self.layers * (self.attention_weights + max(self.active, 1) * self.mlp_weights)

    @property
    def share_of_mlps(self) -> float:
        """Of a dense layer's weights, and so of its compute but for attention's scores."""
        return self.mlp_weights / (self.mlp_weights + self.attention_weights)

    @property
    def sites(self) -> tuple[str, str]:
        """Where each layer sums partial results, in a policy's words."""
        return ("attention", "experts" if self.experts else "mlp")

    @property
    def weights(self) -> int:
        """Of the whole model, embedding and head of the vocabulary included."""
        of_layer = self.attention_weights + max(self.experts, 1) * self.mlp_weights
        return self.layers * of_layer + 2 * self.hidden * self.vocab

    def check_ranks(self, ranks: int) -> None:
        """Raises ValueError, with the sizes that work, if a layer cannot be divided over so many ranks.

        Each rank holds whole heads, and whole key-value heads or one of them that it shares with other ranks.
        """
        able = [size for size in range(1, self.heads + 1) if self._divides(size)]
        if ranks not in able:
            raise ValueError(
                f"--tp {ranks}: does not divide {self.heads} attention heads, {self.kv_heads} key-value heads and MLPs "
                f"of {self.ffn} evenly; sizes that work: {', '.join(map(str, able))}"
            )

    def _divides(self, ranks: int) -> bool:
        shares_groups = self.kv_heads % ranks == 0 or ranks % self.kv_heads == 0
        return self.heads % ranks == 0 and shares_groups and self.ffn % ranks == 0


_LLAMA_8B = Model(32, 4096, 14336, 32, 8, 128, 128256)
_LLAMA_70B = Model(80, 8192, 28672, 64, 8, 128, 128256)

MODELS = {
    "llama-2-7b": Model(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-2-13b": Model(40, 5120, 13824, 40, 40, 128, 32000),
    "llama-2-70b": Model(80, 8192, 28672, 64, 8, 128, 32000),
    "llama-3-8b": _LLAMA_8B,
    "llama-3-70b": _LLAMA_70B,
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.1-70b": _LLAMA_70B,
    "llama-3.1-405b": Model(126, 16384, 53248, 128, 8, 128, 128256),
    "llama-3.3-70b": _LLAMA_70B,
    "mixtral-8x7b": Model(32, 4096, 14336, 32, 8, 128, 32000, experts=8, active=2),
    "mixtral-8x22b": Model(56, 6144, 16384, 48, 8, 128, 32000, experts=8, active=2),
}
# Parts of names that say how weights were trained or stored, not what shape they have.
_NOT_SHAPE = {"meta", "mistralai", "hf", "chat", "instruct", "base"}

KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}


def load(text: str) -> Model:
    """A name of the table, as people write it, a checkpoint's folder, or a config.json.

    Raises ValueError that says what is missing, with names that are near.
    """
    path = Path(text)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return from_config(read_json(path, "--model"), str(path))
    if (name := table_name(text)) in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=3)
    asked = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"--model {text}: neither a folder with config.json, nor such a file, nor one of {', '.join(MODELS)}{asked}"
    )


def table_name(text: str) -> str:
    """As the table spells it: of `meta-llama/Llama-2-7b-hf` llama-2-7b, of `Mixtral-8x22B-Instruct-v0.1` its shape."""
    name = re.sub(r"[\s_:]+", "-", text.rpartition("/")[2].lower())
    name = re.sub(r"^(meta-)?llama-?v?(?=\d)", "llama-", name)
    parts = [part for part in name.split("-") if part not in _NOT_SHAPE and not re.fullmatch(r"v\d+(\.\d+)?", part)]
    return "-".join(parts)


def from_config(config: dict, where: str) -> Model:
    """Raises ValueError for a key that is missing or is no number above 0."""

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key) if config.get(key) is not None else default
        if type(value) is not int or value < 1:
            raise ValueError(f"--model {where}: {key}: {shown(value)} is not a number above 0")
        return value

    if not isinstance(config, dict):
        raise ValueError(f"--model {where}: expected one JSON object")
    sizes = {name: number(key) for name, key in KEYS.items()}
    experts = number("num_local_experts") if config.get("num_local_experts") else 0
    return Model(
        **sizes,
        kv_heads=number("num_key_value_heads", sizes["heads"]),
        head_dim=number("head_dim", sizes["hidden"] // sizes["heads"]),
        experts=experts,
        active=number("num_experts_per_tok") if experts else 0,
    )
