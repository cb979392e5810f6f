# SPDX-License-Identifier: Apache-2.0
import json
import subprocess

import pytest
from slurm import ROOT, launch_environment

PROMPT = "The three branches of the government of the United States are"


@pytest.fixture(scope="session")
def generate():
    """generate(file): the arguments of a short generation that goes into that JSON file."""
    return lambda file: ("generate", "--prompt", PROMPT, "--codec", "mxfp4", "--new-tokens", "12", "--json", file)


@pytest.fixture(scope="session")
def row_of():
    """row_of(file): what that generation gave, times left out."""

    def row(file):
        (row,) = json.loads(file.read_text())["rows"]
        assert row["compressed_calls"] == 60 * 12 and row["text"].startswith(PROMPT)
        return {key: value for key, value in row.items() if key not in ("ttft_ms", "decode_tokens_per_s")}

    return row


@pytest.fixture(scope="session")
def row_of_one_node(generate, row_of, smollm2_padded, tmp_path_factory):
    """The same from two ranks on one node."""
    out = tmp_path_factory.mktemp("one_node") / "out.json"
    command = ["bash", ROOT / "launch/model.sh", *generate(out)]
    env = launch_environment(MODEL=smollm2_padded, NPROC_PER_NODE=2)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return row_of(out)
