# SPDX-License-Identifier: Apache-2.0
"""Which versions of Megatron-Core are supported."""

import logging

import megatron.core

from .agreement import say_once

OLDEST, NEWEST = (0, 16), (0, 19)


def check_megatron() -> None:
    """Raises RuntimeError for a Megatron-Core that is too old; warns of one that is newer than the tests."""
    version = tuple(map(int, megatron.core.__version__.split(".")[:2]))
    said = f"Megatron-Core {megatron.core.__version__}: 0.16 to 0.19 are supported"
    if version < OLDEST:
        raise RuntimeError(f"{said}; an older one has sums that would stay uncompressed")
    if version > NEWEST:
        say_once(logging.WARNING, f"{said}; a newer one may have sums that are not recognised")
