"""Fixtures for real weights and text. They are fetched once per machine and kept in the cache folder:
MEGATRON_COMP_CACHE, or `.cache` in the repository."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Tensors in tests are small: threads that wait for each other cost more than they bring, the more so beside xdist.
torch.set_num_threads(1)


def cached(name, make):
    """The file or folder `name` of the cache, made by `make(path)` if it is missing.

    A lock keeps parallel pytest workers from making it twice, and a rename keeps half of one from ever being seen.
    """
    cache = Path(os.environ.get("MEGATRON_COMP_CACHE") or ROOT / ".cache").resolve()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / name
    if target.exists():
        return target
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = cache / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
            make(partial)
            partial.rename(target)
    return target


def fetch(what):
    return lambda path: subprocess.run([sys.executable, ROOT / "examples" / "fetch.py", what, path], check=True)


@pytest.fixture(scope="session")
def smollm2():
    """Folder of SmolLM2-135M-Instruct, a real Llama: 9 query heads, 3 key-value heads, tied embeddings."""
    return cached("smollm2", fetch("model"))


@pytest.fixture(scope="session")
def smollm2_padded(smollm2):
    """The same model with 12 query and 4 key-value heads, for TP 2 and 4."""
    from checkpoints import pad_heads

    return cached("smollm2_padded", lambda path: pad_heads(smollm2, path))


@pytest.fixture(scope="session")
def sotu_text():
    """Text file of English prose: presidential addresses of 1946 to 1988, 2.6 million characters."""
    return cached("sotu.txt", fetch("text"))
