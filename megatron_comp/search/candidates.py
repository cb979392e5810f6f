# SPDX-License-Identifier: Apache-2.0
"""Which codecs a search may choose from, and the items of its knapsack."""

from ..policy import DROP, CompressionPolicy
from ..wire.codec import Codec, CodecPair, parse_codec
from .solve import Choice

# From 2 to 8 bits in steps that a mean over layers makes fine. An e5m3 scale takes half of an fp16 one and is as good
# to a block (relative error of int4, block 32, on Gaussian values: 0.0979 and 0.0973); `search` takes 5 % off the
# error, Hadamard more where blocks hold outliers. `lloyd` needs Hadamard: it has no zero, so what is small beside
# an outlier becomes large (KL of SmolLM2-135M on 3 ranks in lloyd4:32, 1.44 without and 0.045 with it).
CANDIDATES = (
    *(f"lloyd{bits}:{block}:e5m3:hadamard:search" for bits in (3, 4, 5) for block in (16, 32, 64, 128)),
    *(f"int{bits}:{block}:e5m3:hadamard:search" for bits in (4, 5, 6) for block in (16, 32, 64, 128)),
    *(f"int{bits}:{block}:e5m3:search" for bits, block in ((3, 32), (4, 32), (4, 64), (5, 32), (5, 64), (6, 64))),
    *(f"{element}:32:e5m3:search" for element in ("fp4_e2m1", "fp5_e2m2", "fp6_e2m3")),
    "fp4_e2m1:16:e5m3:search",
    "fp4_e2m1:32:e8m0:hadamard",
    "lloyd2:32:e5m3:hadamard:search",
    "lloyd2:64:e5m3:hadamard:search",
    "int4:32:fp16:hadamard",
    "int7:64:e5m3:hadamard",
    "int8:64:e5m3:hadamard",
)

# What the frontier is set beside.
PRESETS = ("mxfp4", "nvfp4", "quickreduce-int4", "flash-int4", "int4:32:fp16:hadamard")


def parse_candidates(names: list[str]) -> tuple[Codec, ...]:
    """Raises ValueError for what is no codec, or is two: the phases of `two_step` are chosen apart."""
    codecs = [parse_codec(name) for name in dict.fromkeys(names)]
    if pairs := [codec for codec in codecs if isinstance(codec, CodecPair)]:
        raise ValueError(f"--codec {pairs[0]}: candidates are single codecs; each phase of two_step takes one of them")
    return tuple(dict.fromkeys(codecs))


def items(rows: list[dict], candidates: tuple[Codec, ...], tokens: int, steps: int) -> dict[tuple, list[Choice]]:
    """The choices of every (layer, site, step) of an algorithm of so many steps; damages in nats per token.

    rows: of `Measurements.sensitivity`, whose damages are of all its tokens.
    """
    made: dict[tuple, list[Choice]] = {}
    for row in rows:
        for step, damages in enumerate(row["damage"][:steps]):
            choices = [
                Choice(str(codec), nbytes, damage / tokens)
                for codec, nbytes, damage in zip(candidates, row["nbytes"], damages, strict=True)
            ]
            made[row["layer"], row["site"], step] = choices
    return made


def uniform(codec: str, algorithm: str, min_bytes: int | str = 0) -> CompressionPolicy:
    """One codec for all places."""
    return CompressionPolicy(codec=codec, algorithm=algorithm, min_bytes=min_bytes)


def bits_per_value(picked: dict[tuple, Choice], rows: list[dict], steps: int) -> float:
    """What `mc.stats` counts for these choices: the mean over phases of what travels."""
    return 8 * sum(choice.cost for choice in picked.values()) / (steps * sum(row["values"] for row in rows))


def policy_of(picked: dict[tuple, Choice], algorithm: str, min_bytes: int | str = 0) -> CompressionPolicy:
    """Of a choice for each (layer, site, step)."""
    names: dict[tuple[int, str], str] = {}
    for (layer, site, _), choice in picked.items():
        first = names.get((layer, site))
        names[layer, site] = choice.name if first is None else joined_name(first, choice.name)
    return policy_of_names(names, algorithm, min_bytes)


def joined_name(first: str, second: str) -> str:
    """Of the codecs of both phases of `two_step`."""
    return first if first == second else f"{first}>{second}"


def policy_of_names(names: dict[tuple[int, str], str], algorithm: str, min_bytes: int | str = 0) -> CompressionPolicy:
    """Of a policy's word for each (layer, site), in as few words as the layers allow."""
    sites = {
        site: _most_common([n for (_, s), n in names.items() if s == site and n != DROP] or ["none"])
        for _, site in names
    }
    default = _most_common(sites.values())
    layers: dict[int, dict[str, str]] = {}
    for (layer, site), name in names.items():
        layers.setdefault(layer, {})
        if name != sites[site]:
            layers[layer][site] = name
    policy = CompressionPolicy(
        codec=default,
        algorithm=algorithm,
        min_bytes=min_bytes,
        sites={site: name for site, name in sites.items() if name != default},
        layers=_ranges(layers),
    )
    for (layer, site), name in names.items():
        assert policy.codec_name(layer, site, "prefill") == ("none" if name == DROP else name)
        assert site != "attention" or policy.drops(layer) == (name == DROP)
    return policy


def _most_common(names) -> str:
    names = list(names)
    return max(dict.fromkeys(names), key=names.count)


def _ranges(layers: dict[int, dict[str, str]]) -> dict[int | str, dict[str, str]]:
    """Neighbours that say the same under one key; layers that say nothing left out."""
    runs: list[tuple[int, int, dict[str, str]]] = []
    for layer, said in sorted(layers.items()):
        if runs and runs[-1][1] == layer - 1 and runs[-1][2] == said:
            runs[-1] = (runs[-1][0], layer, said)
        else:
            runs.append((layer, layer, said))
    return {first if first == last else f"{first}-{last}": said for first, last, said in runs if said}
