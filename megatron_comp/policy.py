# SPDX-License-Identifier: Apache-2.0
"""`CompressionPolicy`: which site of which layer sends in which codec, and when it does not."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path

from .files import read_yaml, shown
from .wire.calibration import ASSUMED, Calibration
from .wire.codec import Codec, CodecPair, parse_codec
from .wire.cost import ALGORITHMS, pays
from .wire.topology import Islands
from .wire.traffic import step_codecs

SITES = ("attention", "mlp", "experts", "shared_experts")
PHASES = ("prefill", "decode")

# Word for the attention site of a layer: its sum is left out and joins that of the layer's MLP.
DROP = "drop"

# What `min_bytes: auto` stands for where nothing was measured. At 25 Gbit/s a message of this size takes 84 us; a
# 4-bit codec saves 60 us of them, about what the launches of encode and decode cost a GPU.
DEFAULT_MIN_BYTES = 256 * 1024


@dataclass(frozen=True)
class Decision:
    """What one reduction does. `codec` None: the stock collective, and `reason` says why."""

    codec: Codec | CodecPair | None
    algorithm: str = "auto"
    reason: str = ""


@dataclass(frozen=True)
class CompressionPolicy:
    """One answer for each (layer, site, phase, shape, world size).

    Codecs are names as `Codec.parse` takes them, two names joined by `>` (a codec for each phase of `two_step`), or
    `none`: the stock collective. The most specific word counts: a layer's site, a layer, a site, the default. A codec
    under `phases` then takes its place in that phase, but never makes a site compress that `none` keeps.

    Raises ValueError that names the key that is wrong and what it may be.
    """

    codec: str = "none"
    """Default of every site."""
    algorithm: str = "auto"
    """`gather_sum`, `two_step`, `hierarchical`, or `auto`: whichever is predicted faster."""
    min_bytes: int | str = "auto"
    """Messages of fewer bytes, uncompressed, stay uncompressed; `64k` and `1M` count in steps of 1024. `auto`: those
    that the calibration of `megatron-comp calibrate` predicts to be slower compressed; where nothing was measured,
    those of fewer than 262144 bytes."""
    phases: Mapping[str, str] = field(default_factory=dict)
    """Codecs of `prefill` and `decode`."""
    sites: Mapping[str, str] = field(default_factory=dict)
    """Codecs of `attention`, `mlp`, `experts`, `shared_experts`."""
    layers: Mapping[int | str, str | Mapping[str, str]] = field(default_factory=dict)
    """Codecs of layers `3` or `0-2` (numbered from 0 over the whole model), or of their sites. `{attention: drop}`:
    those layers do without attention's sum, see `layers/sync_drop.py`."""
    islands: int | Sequence[Sequence[int]] | None = None
    """What `hierarchical` goes by: ranks of a tensor-parallel group that are near one another, as a list of lists of
    ranks, or as the number of neighbours. None: those of one machine."""
    logits: int | None = None
    """In decode each rank sends so many of its largest logits for each token, not all of them; None: all. For greedy
    decoding, and for sampling among at most so many tokens: see `layers/logits.py`."""

    def __post_init__(self) -> None:
        for each in ("codec", "algorithm", "phases", "sites", "layers"):
            object.__setattr__(self, each, _stripped(getattr(self, each)))
        object.__setattr__(self, "min_bytes", _bytes(self.min_bytes))
        self._check_codec("codec", self.codec)
        _check_choice("algorithm", self.algorithm, ALGORITHMS)
        if self.min_bytes != "auto" and (type(self.min_bytes) is not int or self.min_bytes < 0):
            raise ValueError(
                f"policy: min_bytes: {shown(self.min_bytes)} is neither 'auto' nor a number of bytes >= 0 (65536, 64k)"
            )
        self._check_islands()
        self._check_codecs("phases", self.phases, PHASES)
        self._check_codecs("sites", self.sites, SITES)
        if self.logits is not None and (type(self.logits) is not int or self.logits < 1):
            raise ValueError(
                f"policy: logits: {shown(self.logits)} is not a number >= 1 of candidates that each rank sends"
            )
        self._codecs_of_layers  # noqa: B018 - parsed now, so that mistakes are raised now

    @classmethod
    def from_file(cls, path: str | Path) -> "CompressionPolicy":
        """From a YAML file. Raises ValueError for anything that is not a policy, OSError if it cannot be read."""
        content = read_yaml(path, "policy file")
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def of(cls, given: "CompressionPolicy | str | Path") -> "CompressionPolicy":
        """A policy itself, the one of a file, or the one that uses a codec for every sum.

        Text is a path if it ends in `.yaml` or `.yml`, else a codec's name.

        Raises ValueError for what is neither, OSError if the file cannot be read, TypeError for anything else.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, Path) or (isinstance(given, str) and given.endswith((".yaml", ".yml"))):
            return cls.from_file(given)
        if isinstance(given, str):
            return cls(codec=given)
        raise TypeError(f"a policy is a CompressionPolicy, a policy file or a codec's name, not {type(given).__name__}")

    @classmethod
    def from_dict(cls, content: object) -> "CompressionPolicy":
        keys = [each.name for each in fields(cls)]
        if not isinstance(content, Mapping):
            raise ValueError(f"policy: expected keys ({', '.join(keys)}), got {shown(content)}")
        for key in content:
            _check_choice("key", key, keys)
        return cls(**content)

    def decide(
        self,
        *,
        layer: int,
        site: str,
        phase: str,
        shape: Sequence[int],
        itemsize: int,
        world_size: int,
        calibration: Calibration = ASSUMED,
        scatter: bool = False,
        islands: Islands | None = None,
    ) -> Decision:
        """What a reduction of a `shape` tensor, `itemsize` bytes per value, over `world_size` ranks does.

        calibration, islands: of the group, the same on all its ranks. scatter: a reduce-scatter, not an all-reduce.
        """
        name = self.word(layer, site, phase)
        return self.decide_message(name, shape, itemsize, world_size, calibration, scatter, islands)

    def decide_message(
        self,
        word: str,
        shape: Sequence[int],
        itemsize: int,
        world_size: int,
        calibration: Calibration = ASSUMED,
        scatter: bool = False,
        islands: Islands | None = None,
    ) -> Decision:
        """The same for a place of which the policy says `word`: a codec's name, `none`, or `drop`."""
        if word == "none":
            return Decision(None, reason="policy")
        if world_size == 1:
            return Decision(None, reason="one rank")
        if word == DROP:
            return Decision(None, reason=DROP)
        codec = _parsed(word)
        if self.min_bytes == "auto" and not calibration.compresses:
            return Decision(None, reason="fast link, not calibrated")
        if self.min_bytes == "auto" and calibration.measured:
            if not pays(shape, itemsize, codec, world_size, self.algorithm, calibration, scatter, islands):
                return Decision(None, reason="predicted slower")
        elif math.prod(shape) * itemsize < (DEFAULT_MIN_BYTES if self.min_bytes == "auto" else int(self.min_bytes)):
            return Decision(None, reason="min_bytes")
        return Decision(codec, self.algorithm)

    def word(self, layer: int, site: str, phase: str) -> str:
        """What the policy says of a place: a codec's name, `none`, or `drop`."""
        if site == "attention" and self.drops(layer):
            return DROP
        return self.codec_name(layer, site, phase)

    def codec_name(self, layer: int, site: str, phase: str) -> str:
        """The codec's name for this place, before any look at the message's size; `none` for a dropped sum."""
        of_layer = self._codecs_of_layers.get(layer, {})
        name = of_layer.get(site, of_layer.get("", self.sites.get(site, self.codec)))
        return "none" if name in ("none", DROP) else self.phases.get(phase, name)

    def drops(self, layer: int) -> bool:
        """Whether a layer does without attention's sum, in every phase."""
        return self._codecs_of_layers.get(layer, {}).get("attention") == DROP

    def codecs(self) -> list[Codec]:
        """Every codec in the policy, whether a model has its place or not; both of a pair. In order of their names."""
        of_layers = (name for of_layer in self._codecs_of_layers.values() for name in of_layer.values())
        names = {self.codec, *self.phases.values(), *self.sites.values(), *of_layers} - {"none", DROP}
        return sorted({codec for name in names for codec in step_codecs(parse_codec(name))}, key=str)

    @property
    def predicts(self) -> bool:
        """Whether decisions rest on predicted times."""
        return "auto" in (self.min_bytes, self.algorithm) and bool(self.codecs())

    @property
    def has_levels(self) -> bool:
        """Whether sums may be hierarchical, where the ranks of a group are on several islands."""
        return self.algorithm in ("auto", "hierarchical") and bool(self.codecs())

    def islands_of(self, hosts: Sequence[str]) -> Islands:
        """Of a group whose ranks are on these machines. Raises ValueError if `islands` does not fit so many ranks."""
        if self.islands is None:
            return Islands.of_names(hosts)
        try:
            if isinstance(self.islands, int):
                return Islands.of_size(len(hosts), self.islands)
            islands = Islands(self.islands)
            if islands.ranks != len(hosts):
                raise ValueError(f"{islands} are of {islands.ranks} ranks, the group is of {len(hosts)}")
        except ValueError as error:
            raise ValueError(f"policy: islands: {error}") from None
        return islands

    def check_layers(self, count: int) -> None:
        """Raises ValueError that names a key under `layers` that a model of `count` layers does not have."""
        for key in self.layers:
            if _layer_range(key)[-1] >= count:
                raise ValueError(f"policy: layers: {shown(key)} is out of range; the model has layers 0 to {count - 1}")

    def digest(self) -> str:
        """A short text that is equal for equal policies."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """One line of JSON with what differs from the defaults."""
        default = CompressionPolicy()
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        said = {key: value for key, value in said.items() if key == "codec" or value != getattr(default, key)}
        return json.dumps(_with_text_keys(said), sort_keys=True)

    @cached_property
    def _codecs_of_layers(self) -> dict[int, dict[str, str]]:
        """By layer number: codec names by site, the layer's own under the empty name."""
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"policy: layers: expected layer numbers or ranges with codecs, got {shown(self.layers)}")
        by_layer: dict[int, dict[str, str]] = {}
        for key, value in self.layers.items():
            if isinstance(value, Mapping):
                self._check_codecs(f"layers: {key}", value, SITES, drop="attention")
            else:
                self._check_codec(f"layers: {key}", value)
                value = {"": value}
            for layer in _layer_range(key):
                if layer in by_layer:
                    raise ValueError(f"policy: layers: {shown(key)} names layer {layer}, which another key names too")
                by_layer[layer] = dict(value)
        return by_layer

    def _check_islands(self) -> None:
        if self.islands is None or type(self.islands) is int and self.islands > 0:
            return
        try:
            if isinstance(self.islands, int) or not all(type(rank) is int for each in self.islands for rank in each):
                raise TypeError
            Islands(self.islands)
        except TypeError:
            raise ValueError(
                f"policy: islands: {shown(self.islands)} is neither a number of ranks > 0 nor a list of lists of ranks"
            ) from None
        except ValueError as error:
            raise ValueError(f"policy: islands: {error}") from None

    def _check_codecs(
        self, where: str, codecs: Mapping[str, str], allowed: Sequence[str], drop: str | None = None
    ) -> None:
        """drop: the one key that may say so."""
        if not isinstance(codecs, Mapping):
            raise ValueError(f"policy: {where}: expected codecs by {', '.join(allowed)}, got {shown(codecs)}")
        for key, name in codecs.items():
            _check_choice(where, key, allowed)
            if name != DROP or key != drop:
                self._check_codec(f"{where}: {key}", name)

    def _check_codec(self, where: str, name: str) -> None:
        if name == "none":
            return
        if name == DROP:
            raise ValueError(f"policy: {where}: only attention under layers drops: layers: {{5: {{attention: drop}}}}")
        try:
            codec = parse_codec(name)
        except ValueError as error:
            raise ValueError(f"policy: {where}: {error}, or 'none'") from None
        if isinstance(codec, CodecPair) and self.algorithm == "gather_sum":
            raise ValueError(f"policy: {where}: gather_sum has one phase and takes one codec, not {shown(name)}")


@lru_cache
def _parsed(name: str) -> Codec | CodecPair:
    return parse_codec(name)


def _with_text_keys(value: object) -> object:
    """Mappings with text for keys, which JSON can sort: YAML gives `3` as a number and `0-2` as text."""
    return {str(k): _with_text_keys(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _stripped(value: object) -> object:
    """Words without spaces around them, inside of mappings too; keys as they are."""
    if isinstance(value, Mapping):
        return {key: _stripped(each) for key, each in value.items()}
    return value.strip() if isinstance(value, str) else value


def _bytes(value: object) -> object:
    """The number that `65536`, `64k`, `64KiB`, `1M` or `1MiB` stands for; anything else as it is."""
    match = re.fullmatch(r"\s*([0-9]{1,15}) ?(?:([kKM])(?:iB)?)?\s*", value) if isinstance(value, str) else None
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[(match[2] or "").lower()] if match else _stripped(value)


def _check_choice(where: str, given: object, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ValueError(f"policy: {where}: {shown(given)} is unknown; allowed are {', '.join(allowed)}")


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _layer_range(key: int | str) -> range:
    first, dash, last = str(key).partition("-")
    if isinstance(key, bool) or not _is_decimal(first) or (dash and not _is_decimal(last)):
        raise ValueError(f"policy: layers: {shown(key)} is neither a layer number, as in 3, nor a range, as in 0-2")
    if max(len(first), len(last)) > 5:
        raise ValueError(f"policy: layers: {shown(key)} is beyond any model's number of layers")
    layers = range(int(first), int(last if dash else first) + 1)
    if not layers:
        raise ValueError(f"policy: layers: {shown(key)} is an empty range")
    return layers
