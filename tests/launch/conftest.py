# SPDX-License-Identifier: Apache-2.0
import json
import sys

import commands
import pytest
from characters import character_llama
from slurm import launch_environment

PROMPT = "The three branches of the government of the United States are"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a tiny Llama that can go on for a long time."""
    return character_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=32768)


@pytest.fixture(scope="session")
def generate():
    """generate(file): the arguments of a short generation that goes into that JSON file."""
    return lambda file: ("generate", "--prompt", PROMPT, "--codec", "mxfp4", "--new-tokens", "12", "--json", file)


@pytest.fixture(scope="session")
def row_of(model):
    """row_of(file): what that generation gave, times left out."""
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]

    def row(file):
        (row,) = json.loads(file.read_text())["rows"]
        assert row["compressed_calls"] == 2 * layers * 12
        assert row["text"].startswith(" ".join(PROMPT))  # the tokenizer has a space between tokens
        return {key: value for key, value in row.items() if key not in ("ttft_ms", "decode_tokens_per_s")}

    return row


@pytest.fixture(scope="session")
def row_of_command(generate, row_of, model, tmp_path_factory):
    """The same from two ranks that the command starts itself."""
    out = tmp_path_factory.mktemp("command") / "out.json"
    command = [sys.executable, "-m", "megatron_comp.cli", *generate(out), "--model", model, "--tp", 2]
    done = commands.run(command, launch_environment())
    assert done.returncode == 0, done.stderr
    return row_of(out)
