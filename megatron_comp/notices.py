# SPDX-License-Identifier: Apache-2.0
"""What a user should know of a run that goes on."""

import warnings


class Notice(UserWarning):
    """A warning of this package's own. The command line shows these, each once, and no others."""


def notice(text: str, stacklevel: int = 2) -> None:
    """Warns of `text` at the caller, or at a frame further out."""
    warnings.warn(text, Notice, stacklevel=stacklevel + 1)
