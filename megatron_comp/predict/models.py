"""Shapes of models: rows of data, or read from a Hugging Face config.json."""

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
    def share_of_mlps(self) -> float:
        """Of a dense layer's weights, and so of its compute but for attention's scores."""
        return self.mlp_weights / (self.mlp_weights + self.attention_weights)

    @property
    def sites(self) -> tuple[str, str]:
        """Where each layer sums partial results, in a policy's words."""
        return ("attention", "experts" if self.experts else "mlp")


MODELS = {
    "llama-2-7b": Model(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-2-13b": Model(40, 5120, 13824, 40, 40, 128, 32000),
    "llama-2-70b": Model(80, 8192, 28672, 64, 8, 128, 32000),
    "llama-3.1-8b": Model(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b": Model(80, 8192, 28672, 64, 8, 128, 128256),
    "mixtral-8x7b": Model(32, 4096, 14336, 32, 8, 128, 32000, experts=8, active=2),
}

KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}


def load(text: str) -> Model:
    """A name of the table, a checkpoint's folder, or a config.json. Raises ValueError that says what is missing."""
    if text in MODELS:
        return MODELS[text]
    path = Path(text)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--model {text}: neither a folder with config.json, nor such a file, nor {', '.join(MODELS)}")
    return from_config(read_json(path, "--model"), str(path))


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
