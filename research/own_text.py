# SPDX-License-Identifier: Apache-2.0
"""Writes a calibration text that a model makes up by itself, for use where no text like that of its users is at hand.

    python -m research.own_text MODEL --out own.txt
    python -m research.own_text MODEL --beside handbook.txt --out mixed.txt

Each piece starts from a token drawn at random, so that the pieces are about many things, and goes on with tokens drawn
from the model's predictions. With --beside, pieces of that file and of the model's own text stand in turn: a
regression that is checked on the end of its text then sees both kinds there.

SmolLM2-135M writes 65,536 tokens in 9 minutes on 2 virtual cores of an AMD EPYC with bf16 instructions.
"""

import argparse
from itertools import chain
from pathlib import Path

import torch

from megatron_comp.files import write_text
from megatron_comp.inference.text import read_text, read_tokenizer
from megatron_comp.launcher.progress import progress

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PIECE = 4000  # characters, or a paragraph more


@torch.no_grad()
def own_text(model, tokenizer, pieces: int, length: int, batch: int, seed: int) -> str:
    """So many pieces of `length` tokens, with an empty line between them. model: of transformers."""
    torch.manual_seed(seed)
    special = sorted(set(tokenizer.all_special_ids))
    words = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    first = words[torch.randint(len(words), (pieces, 1))]
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "suppress_tokens": special}
    rows = chain.from_iterable(
        model.generate(
            part, attention_mask=torch.ones_like(part), min_new_tokens=length - 1, max_new_tokens=length - 1, **how
        )
        for part in progress(first.split(batch), desc="own text", unit="batch")
    )
    return "\n\n".join(tokenizer.decode(row) for row in rows)


def in_turn(one: str, other: str) -> str:
    """Pieces of both texts in turn, whole paragraphs, until one of them ends."""
    return "".join(chain.from_iterable(zip(_pieces(one), _pieces(other), strict=False)))


def _pieces(text: str) -> list[str]:
    made = [""]
    for paragraph in text.split("\n\n"):
        if len(made[-1]) >= PIECE:
            made.append("")
        made[-1] += paragraph + "\n\n"
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the text file to write")
    parser.add_argument("--beside", type=Path, help="a text whose pieces stand in turn with the model's own")
    parser.add_argument("--pieces", type=int, default=128, help="of the model's own text (default 128)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them (default 512)")
    parser.add_argument("--batch", type=int, default=128, help="pieces that are written at once (default 128)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="default bf16; fp32 is faster without bf16 instructions"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    for option, least in (("pieces", 1), ("length", 2), ("batch", 1)):
        if (given := getattr(args, option)) < least:
            parser.error(f"--{option} {given}: at least {least} is needed")
    beside = read_text(args.beside) if args.beside else None
    tokenizer = read_tokenizer(args.model)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).eval()
    text = own_text(model, tokenizer, args.pieces, args.length, args.batch, args.seed)
    write_text(args.out, text if beside is None else in_turn(beside, text))


if __name__ == "__main__":
    main()
