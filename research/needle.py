# SPDX-License-Identifier: Apache-2.0
"""Writes a retrieval task for `megatron-comp evaluate --tasks`: a word to be found again in a long text.

    python -m research.needle MODEL --text sotu.txt --tokens 1024 4096 8000 --depths 10 50 90 --items 12 --out needles
    megatron-comp evaluate --model MODEL --tp 3 --include-path needles --tasks needle_1024_at_10,... --codec mxfp4

Each item is text of its own from the file, cut into sentences, in which one more sentence stands at that share of its
length: a city's colour. The text ends in the question; the choices are that colour and three others, a token each in
most vocabularies, so that one forward answers an item. One task for each length and depth. Chance is 1 in 4.
"""

import argparse
import random
import re
from pathlib import Path

from examples.fetch import write_task
from megatron_comp.inference.text import read_tokenizer

CITIES = ("Tallinn", "Quito", "Lagos", "Hanoi", "Oslo", "Lima", "Riga", "Perth", "Turin", "Accra")
COLOURS = ("red", "blue", "green", "black", "white", "brown", "yellow", "purple")
CHOICES = 4
NEEDLE = "The secret colour of {city} is {colour}."
QUESTION = "\n\nQuestion: What is the secret colour of {city}? Answer: The secret colour of {city} is"


def item(sentences: list[str], lengths: list[int], tokens: int, depth: int, draw: random.Random) -> dict:
    """`context`, `choices` and `gold`. sentences: of the file; lengths: their tokens."""
    city = draw.choice(CITIES)
    colours = draw.sample(COLOURS, CHOICES)
    gold = draw.randrange(CHOICES)
    place = draw.randrange(len(sentences))
    taken: list[str] = []
    room = tokens - 60  # the needle and the question take fewer
    while room >= lengths[place]:
        taken.append(sentences[place])
        room -= lengths[place]
        place = (place + 1) % len(sentences)
    taken.insert(len(taken) * depth // 100, NEEDLE.format(city=city, colour=colours[gold]))
    return {"context": " ".join(taken) + QUESTION.format(city=city), "choices": colours, "gold": gold}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8000])
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 50, 90], help="in percent of the text")
    parser.add_argument("--items", type=int, default=12, help="of each task")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args(argv)
    tokenizer = read_tokenizer(args.model)
    sentences = re.split(r"(?<=[.!?])\s+", args.text.read_text(encoding="utf-8"))
    lengths = [len(tokenizer.encode(" " + sentence)) for sentence in sentences]
    args.out.mkdir(parents=True, exist_ok=True)
    for tokens in args.tokens:
        for depth in args.depths:
            draw = random.Random(f"{tokens} {depth}")
            items = [item(sentences, lengths, tokens, depth, draw) for _ in range(args.items)]
            write_task(args.out, f"needle_{tokens}_at_{depth}", items)


if __name__ == "__main__":
    main()
