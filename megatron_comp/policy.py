# SPDX-License-Identifier: Apache-2.0
"""`CompressionPolicy`: which site of which layer sends in which codec, and when it does not."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

from . import policy_words as words
from .files import shown
from .policy_words import DROP
from .wire.calibration import ASSUMED, Calibration
from .wire.codec import Codec, CodecPair, parse_codec
from .wire.cost import ALGORITHMS, pays
from .wire.topology import Islands
from .wire.traffic import step_codecs
from .yaml_files import read_yaml

SITES = ("attention", "mlp", "experts", "shared_experts")
PHASES = ("prefill", "decode")

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

    predictor: str | None = None
    """A file of `megatron-comp predictor fit`: of compressed sums only that is sent which the ranks cannot predict from
    their block's input, see `layers/predictor.py`. In a policy file the path is relative to the policy's folder."""

    def __post_init__(self) -> None:
        for each in ("codec", "algorithm", "phases", "sites", "layers"):
            object.__setattr__(self, each, words.stripped(getattr(self, each)))
        object.__setattr__(self, "min_bytes", words.number_of_bytes(self.min_bytes))
        words.check_codec("codec", self.codec, self.algorithm)
        words.check_choice("algorithm", self.algorithm, ALGORITHMS)
        if self.min_bytes != "auto" and (type(self.min_bytes) is not int or self.min_bytes < 0):
            raise ValueError(
                f"policy: min_bytes: {shown(self.min_bytes)} is neither 'auto' nor a number of bytes >= 0 (65536, 64k)"
            )
        words.check_islands(self.islands)
        words.check_codecs("phases", self.phases, PHASES, self.algorithm)
        words.check_codecs("sites", self.sites, SITES, self.algorithm)
        if self.logits is not None and (type(self.logits) is not int or self.logits < 1):
            raise ValueError(
                f"policy: logits: {shown(self.logits)} is not a number >= 1 of candidates that each rank sends"
            )
        if self.predictor is not None and not words.is_file_name(self.predictor):
            raise ValueError(f"policy: predictor: {shown(self.predictor)} is not a file's name")
        self._codecs_of_layers  # noqa: B018 - parsed now, so that mistakes are raised now

    @classmethod
    def from_file(cls, path: str | Path) -> "CompressionPolicy":
        """From a YAML file. Raises ValueError for anything that is not a policy, OSError if it cannot be read."""
        content = read_yaml(path, "policy file")
        try:
            policy = cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if policy.predictor is None:
            return policy
        return replace(policy, predictor=str(Path(path).parent / policy.predictor))

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
            words.check_choice("key", key, keys)
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

    def word(self, layer: int | None, site: str, phase: str) -> str:
        """What the policy says of a place: a codec's name, `none`, or `drop`. layer: None where it is unknown."""
        if site == "attention" and self.drops(layer):
            return DROP
        return self.codec_name(layer, site, phase)

    def codec_name(self, layer: int | None, site: str, phase: str) -> str:
        """The codec's name for this place, before any look at the message's size; `none` for a dropped sum."""
        of_layer = self._codecs_of_layers.get(layer, {})
        name = of_layer.get(site, of_layer.get("", self.sites.get(site, self.codec)))
        return "none" if name in ("none", DROP) else self.phases.get(phase, name)

    def drops(self, layer: int | None) -> bool:
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
            if words.layer_range(key)[-1] >= count:
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
    def _codecs_of_layers(self) -> Mapping[int | None, Mapping[str, str]]:
        """By layer number: codec names by site, the layer's own under the empty name."""
        return words.codecs_of_layers(self.layers, SITES, self.algorithm)


@lru_cache
def _parsed(name: str) -> Codec | CodecPair:
    return parse_codec(name)


def _with_text_keys(value: object) -> object:
    """Mappings with text for keys, which JSON can sort: YAML gives `3` as a number and `0-2` as text."""
    return {str(k): _with_text_keys(v) for k, v in value.items()} if isinstance(value, Mapping) else value
