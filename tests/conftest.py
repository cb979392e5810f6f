# SPDX-License-Identifier: Apache-2.0
"""Fixtures for real weights and text. They are fetched once per machine and kept in the cache folder:
MEGATRON_COMP_CACHE, or `.cache` in the repository."""

import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Fixtures of the command line, for every room of which there is a subcommand.
pytest_plugins = ["command_line"]

# Triton reads this once, when something first imports it: without a GPU, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What somebody measured here must not decide what tests send.
os.environ["MEGATRON_COMP_CALIBRATION"] = "assumed"

# Tensors in tests are small: threads that wait for each other cost more than they bring, the more so beside xdist.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """Which Megatron-Core it was: launch/test.sh can be given another one."""
    # A bare GPU machine has none, and there the name inside of a missing package cannot be looked up.
    spec = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    if spec is None:
        terminalreporter.write_line("no Megatron-Core")
    else:
        folder, version = spec.submodule_search_locations[0], importlib.metadata.version("megatron-core")
        terminalreporter.write_line(f"Megatron-Core {version} in {folder}")


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
def smollm2_short(smollm2):
    """Its first layers alone: for what needs real weights and a real tokenizer, but no sensible text."""
    from checkpoints import SHORT, first_layers

    return cached(f"smollm2_short_{SHORT}", lambda path: first_layers(smollm2, path, SHORT))


@pytest.fixture(scope="session")
def smollm2_short_padded(smollm2_short):
    """Those with 12 query and 4 key-value heads."""
    from checkpoints import SHORT, pad_heads

    return cached(f"smollm2_short_{SHORT}_padded", lambda path: pad_heads(smollm2_short, path))


@pytest.fixture(scope="session")
def mixtral_copy(smollm2_short_padded, sotu_text):
    """That as a mixture of four equal experts: it computes the same, whichever experts a token goes to."""
    return upcycled("copy", smollm2_short_padded, sotu_text)


@pytest.fixture(scope="session")
def mixtral_split(smollm2_short_padded, sotu_text):
    """That as a mixture of eight different experts, in pairs: it computes the same if all tokens go right."""
    return upcycled("split", smollm2_short_padded, sotu_text)


def upcycled(kind, source, text):
    from checkpoints import SHORT, upcycle

    end = text.read_text(encoding="utf-8")[-4000:]  # tests read the beginning
    return cached(f"mixtral_{kind}_{SHORT}", lambda path: upcycle(source, path, kind, end))


@pytest.fixture(scope="session")
def mixtrals(tmp_path_factory):
    """Tiny random Mixtrals of four and of eight experts, by number of experts, with Hugging Face's answers."""
    from checkpoints import reference, tiny_mixtral

    made = {}
    for experts in (4, 8):
        folder = tiny_mixtral(tmp_path_factory.mktemp(f"mixtral{experts}"), seed=experts, experts=experts)
        ids = torch.randint(0, 128, (2, 11), generator=torch.Generator().manual_seed(experts))
        made[experts] = reference(folder, ids, ids[0, :7].tolist(), 6)
    return made


@pytest.fixture(scope="session")
def sotu_text():
    """Text file of English prose: presidential addresses of 1946 to 1988, 2.6 million characters."""
    return cached("sotu.txt", fetch("text"))


@pytest.fixture(scope="session")
def triton_release():
    """Called with a version: the folder with that Triton, for the PYTHONPATH of a process of its own."""

    def folder(version):
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"triton=={version}", "--target"]
        try:
            return cached(f"triton-{version}", lambda path: subprocess.run([*install, path], check=True))
        except subprocess.CalledProcessError:
            pytest.skip(f"pip could not fetch triton=={version}")

    return folder


@pytest.fixture(scope="session")
def transformer_engine_wheel():
    """Folder with the Python of Transformer Engine; see tests/support/real_te.py."""
    import real_te

    try:
        return cached(f"transformer-engine-{real_te.VERSION}", real_te.fetch)
    except subprocess.CalledProcessError:
        pytest.skip(f"pip could not fetch transformer-engine=={real_te.VERSION}")


@pytest.fixture(scope="session")
def modelopt_packages():
    """Folder with NVIDIA's ModelOpt and what it imports beyond the project's own packages, for a path's end."""
    packages = [
        "nvidia-modelopt==0.47.0",
        "omegaconf==2.3.0",
        "antlr4-python3-runtime==4.9.3",
        "pulp<4",
        "nvidia-ml-py",
    ]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *packages, "scipy", "--target"]
    try:
        return cached("modelopt-0.47.0", lambda path: subprocess.run([*install, path], check=True))
    except subprocess.CalledProcessError:
        pytest.skip("pip could not fetch nvidia-modelopt==0.47.0")


@pytest.fixture(scope="session")
def compiled_kernels():
    """Folder that Triton keeps compiled kernels in."""
    return cached("compiled-kernels", Path.mkdir)
