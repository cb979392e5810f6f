# SPDX-License-Identifier: Apache-2.0
"""What a policy may say: words made into values, or refused with the key that is wrong and what it may be.

Everything here raises ValueError for that.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .files import shown
from .wire.codec import CodecPair, parse_codec
from .wire.topology import Islands

# Word for the attention site of a layer: its sum is left out and joins that of the layer's MLP.
DROP = "drop"


def stripped(value: object) -> object:
    """Words without spaces around them, inside of mappings too; keys as they are."""
    if isinstance(value, Mapping):
        return {key: stripped(each) for key, each in value.items()}
    return value.strip() if isinstance(value, str) else value


def number_of_bytes(value: object) -> object:
    """The number that `64k`, `64KiB`, `1M` or `1MiB` stands for; anything else as it is."""
    match = re.fullmatch(r"\s*([0-9]{1,9}) ?([kKM])(iB)?\s*", value) if isinstance(value, str) else None
    return int(match[1]) * {"k": 1 << 10, "m": 1 << 20}[match[2].lower()] if match else stripped(value)


def check_choice(where: str, given: object, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ValueError(f"policy: {where}: {shown(given)} is unknown; allowed are {', '.join(allowed)}")


def check_codec(where: str, name: str, algorithm: str) -> None:
    """A codec, two of them where the algorithm has two steps, or `none`."""
    if name == "none":
        return
    if name == DROP:
        raise ValueError(f"policy: {where}: only attention under layers drops: layers: {{5: {{attention: drop}}}}")
    try:
        codec = parse_codec(name)
    except ValueError as error:
        raise ValueError(f"policy: {where}: {error}, or 'none'") from None
    if isinstance(codec, CodecPair) and algorithm == "gather_sum":
        raise ValueError(f"policy: {where}: gather_sum has one phase and takes one codec, not {shown(name)}")


def check_codecs(
    where: str, codecs: Mapping[str, str], allowed: Sequence[str], algorithm: str, drop: str | None = None
) -> None:
    """Codecs by the allowed keys. drop: the one key that may say so."""
    if not isinstance(codecs, Mapping):
        raise ValueError(f"policy: {where}: expected codecs by {', '.join(allowed)}, got {shown(codecs)}")
    for key, name in codecs.items():
        check_choice(where, key, allowed)
        if name != DROP or key != drop:
            check_codec(f"{where}: {key}", name, algorithm)


def codecs_of_layers(
    layers: Mapping[int | str, str | Mapping[str, str]], sites: Sequence[str], algorithm: str
) -> dict[int | None, dict[str, str]]:
    """By layer number: codec names by site, the layer's own under the empty name."""
    if not isinstance(layers, Mapping):
        raise ValueError(f"policy: layers: expected layer numbers or ranges with codecs, got {shown(layers)}")
    by_layer: dict[int | None, dict[str, str]] = {}
    for key, value in layers.items():
        if isinstance(value, Mapping):
            check_codecs(f"layers: {key}", value, sites, algorithm, drop="attention")
        else:
            check_codec(f"layers: {key}", value, algorithm)
            value = {"": value}
        for layer in layer_range(key):
            if layer in by_layer:
                raise ValueError(f"policy: layers: {shown(key)} names layer {layer}, which another key names too")
            by_layer[layer] = dict(value)
    return by_layer


def layer_range(key: int | str) -> range:
    """Of `3` or `0-2`."""
    first, dash, last = str(key).partition("-")
    if isinstance(key, bool) or not _is_decimal(first) or (dash and not _is_decimal(last)):
        raise ValueError(f"policy: layers: {shown(key)} is neither a layer number, as in 3, nor a range, as in 0-2")
    if max(len(first), len(last)) > 5:
        raise ValueError(f"policy: layers: {shown(key)} is beyond any model's number of layers")
    layers = range(int(first), int(last if dash else first) + 1)
    if not layers:
        raise ValueError(f"policy: layers: {shown(key)} is an empty range")
    return layers


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def is_file_name(value: object) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and value.strip() != "" and "\0" not in value)


def check_islands(islands: int | Sequence[Sequence[int]] | None) -> None:
    """A number of neighbours, ranks by island, or None."""
    if islands is None or type(islands) is int and islands > 0:
        return
    try:
        if isinstance(islands, int) or not all(type(rank) is int for each in islands for rank in each):
            raise TypeError
        Islands(islands)
    except TypeError:
        raise ValueError(
            f"policy: islands: {shown(islands)} is neither a number of ranks > 0 nor a list of lists of ranks"
        ) from None
    except ValueError as error:
        raise ValueError(f"policy: islands: {error}") from None
