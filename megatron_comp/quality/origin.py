"""What a measurement was made of: model and text, by name and digest."""

import argparse
import hashlib
from pathlib import Path


def origin(args: argparse.Namespace) -> dict[str, object]:
    """What everything measured or made of this model and this text depends on."""
    return {
        "model": f"{Path(args.model).name} {digest(Path(args.model, 'config.json'))}",
        "text": f"{Path(args.text).name} {digest(args.text)}",
        "tokens": args.tokens,
        "context": args.context,
    }


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
