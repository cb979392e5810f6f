# SPDX-License-Identifier: Apache-2.0
"""What a user should know of a run that goes on."""

import re
import warnings


class Notice(UserWarning):
    """A warning of this package's own. The command line shows these, each once, and no others."""


def notice(text: str, stacklevel: int = 2) -> None:
    """Warns of `text` at the caller, or at a frame further out."""
    warnings.warn(text, Notice, stacklevel=stacklevel + 1)


MOST_CHARACTERS = 1500  # of an error


def one_line(error: Exception) -> str:
    """What an error says, without the frames of C++ that torch adds, and cut where it is no text for people."""
    said = str(error).partition("\nException raised from ")[0]
    if isinstance(error, OSError) and error.strerror and error.filename:
        said = f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or "can't allocate memory" in said:
        asked = re.search("allocate ([0-9]+) bytes", said)
        return "not enough memory" + (f": {int(asked[1]):,} bytes were asked for" if asked else "")
    text = " ".join(said.split()) or type(error).__name__
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + " ..."
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
