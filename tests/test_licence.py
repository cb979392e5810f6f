# SPDX-License-Identifier: Apache-2.0
"""Every source file names its licence in its first two lines."""

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("megatron_comp", "kernels", "launch", "examples", "docs", "tests", ".ci", "research")
SUFFIXES = (".py", ".sh", ".sbatch", ".c", ".h")
LINE = "SPDX-License-Identifier: Apache-2.0"


def sources():
    for folder in FOLDERS:
        for file in sorted((REPO / folder).rglob("*")):
            is_source = file.suffix in SUFFIXES or file == REPO / ".ci" / "run"
            if is_source and not file.is_symlink() and "megatron_comp/kernels/" not in file.as_posix():
                yield file


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(REPO)))
def test_a_source_names_its_licence(file):
    assert any(LINE in line for line in file.read_text().splitlines()[:2])
