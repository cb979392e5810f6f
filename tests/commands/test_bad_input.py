# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong: one clear line that names it and what is allowed, a non-zero status, and no hang."""

import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from characters import character_llama

from megatron_comp import cli

GENERATE = ("--prompt", "Hello")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of two shards for TP 1, 2 and 4."""
    return Path(character_llama(tmp_path_factory.mktemp("tiny"), max_shard_size="60KB"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--codec", "mxfp5"], r"codec 'mxfp5' is neither a preset \(mxfp4, .*\) nor .*element:block:scale"),
        (["--codec", "int4:33:fp16"], r"unknown block size '33'; known are 8, 16, 32, 64, 128, 256"),
        (["--codec", "mxfp4", "--policy", "p.yaml"], r"--codec or --policy, not both"),
        (["--codec", ""], r"codec '' is neither a preset"),
        (["--codec", "int4:" + "x" * 5000], r"codec 'int4:xxx+\.\.\.x+' is neither a preset"),
        (["--policy", "nowhere.yaml"], r"error: nowhere.yaml: No such file or directory$"),
        (["--tp", "0"], r"--tp 0: at least one rank"),
        (["--model", "nowhere"], r"--model nowhere: no such folder"),
        (["--new-tokens", "0"], r"--new-tokens 0: at least one"),
        (["--new-tokens", "256"], r"--new-tokens 256: .* holds 256 tokens, the prompt's among them"),
        (["--max-new-tokens", "0"], r"--new-tokens 0: at least one"),
        (["--min-bytes", "-1", "--codec", "mxfp4"], r"min_bytes: -1 is neither 'auto' nor a number of bytes"),
        (["--min-bytes", "1e3", "--codec", "mxfp4"], r"min_bytes: '1e3' is neither"),
        (["--json", "nowhere/out.json"], r"--json nowhere/out.json: .*its folder does not exist"),
        (["--json", "."], r"--json \.: not a file"),
        (["--timeout", "-5"], r"--timeout -5.0: allowed are seconds above 0"),
        (["--algorithm", "two_step"], r"--algorithm is for codecs given by --codec"),
    ],
)
def test_seen_before_any_rank_starts(capsys, monkeypatch, tiny, arguments, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cli.ranks, "start", lambda *_: pytest.fail("ranks were started"))
    status = cli.main(["generate", "--model", str(tiny), "--tp", "2", *GENERATE, *arguments])
    assert status == 2
    assert_one_line(capsys.readouterr().err, message)


def test_policy_typo_names_file_and_key(capsys, monkeypatch, tiny, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    policy = tmp_path / "policy.yaml"
    policy.write_text("codec: mxfp4\nminbytes: 5\n")
    assert cli.main(["generate", "--model", str(tiny), "--tp", "2", *GENERATE, "--policy", str(policy)]) == 2
    assert_one_line(capsys.readouterr().err, r"policy.yaml: .*'minbytes' is unknown; allowed are codec, ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text", "nowhere.txt"], r"--text nowhere.txt: no such file"),
        (["--context", "1"], r"--context 1: allowed are 2 to"),
        (["--tokens", "0"], r"--tokens 0: two are needed at least"),
        (["--tokens", "100", "--context", "512"], r"--context 512: allowed are 2 to --tokens 100"),
        (["--tokens", "10000000"], r"sotu.txt has [0-9]+ bytes, too few for 9999872 tokens"),
    ],
)
def test_evaluate_before_any_rank_starts(capsys, monkeypatch, tiny, sotu_text, arguments, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status = cli.main(["evaluate", "--model", str(tiny), "--tp", "2", "--text", str(sotu_text), *arguments])
    assert status == 2
    assert_one_line(capsys.readouterr().err, message)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def truncate(folder):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])


def remove(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()


@pytest.mark.parametrize(
    "damage, tp, message",
    [
        (remove, 2, r"model-00001-of-\d+.safetensors"),
        (truncate, 2, r"safetensors"),
        (lambda f: edit_config(f, model_type="gpt2", architectures=["GPT2LMHeadModel"]), 2, r"GPT2.*LlamaForCausalLM"),
        (lambda f: (f / "config.json").unlink(), 2, r"config.json is missing"),
        (lambda f: None, 3, r"tensor_parallel 3 does not divide .* this model allows \[1, 2, 4"),
        (lambda f: (f / "tokenizer.json").unlink(), 2, r"no tokenizer"),
    ],
    ids=["missing shard", "truncated shard", "not a Llama", "no config", "TP does not divide", "no tokenizer"],
)
def test_seen_by_the_ranks(command, tiny, tmp_path, damage, tp, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    damage(folder)
    done = command("generate", "--model", folder, "--tp", tp, *GENERATE)
    assert done.returncode == 2
    assert_one_line(done.stderr, message)


def test_prompt_longer_than_the_context(command, smollm2_short):
    done = command("generate", "--model", smollm2_short, "--tp", 1, "--prompt", "Hello " * 9000)
    assert done.returncode == 2
    assert_one_line(done.stderr, r"prompt of \d+ tokens and 32 new ones exceed the model's context of 8192")


@pytest.mark.parametrize(
    "codecs, expected",
    [
        (("mxfp4", "mxfp4", "mxfp8"), "differs .*rank 0: version .*mxfp4.*rank 2: version .*mxfp8"),
        (("mxfp4", "mxfp4", "mxfp5"), "rank 2: codec 'mxfp5' is neither a preset"),
    ],
)
def test_ranks_with_different_policies(command, smollm2_short, unused_port, codecs, expected):
    """Each rank started by hand, as a wrong job script would: all say what is wrong, also what one alone has seen."""

    def start(rank, codec):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port), "GLOO_SOCKET_IFNAME": "lo"}
        place |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
        return command("generate", "--model", smollm2_short, "--tp", 3, *GENERATE, "--codec", codec, **place)

    with ThreadPoolExecutor(3) as threads:
        ranks = list(threads.map(start, range(3), codecs))
    for rank, done in enumerate(ranks):
        assert done.returncode == 2
        assert_one_line(done.stderr, rf"error on rank {rank}: .*{expected}" if rank < 2 else expected.split(": ")[-1])


def test_killed_rank(start_command, tmp_path):
    """One rank dies in the middle of a forward: the other says so, the command fails, and nobody is left behind."""
    folder = character_llama(tmp_path / "model", max_position_embeddings=6000)
    process = start_command("generate", "--model", folder, "--tp", 2, *GENERATE, "--new-tokens", 5000)
    deadline = time.monotonic() + 120
    seen = ""
    while not re.search(r"[1-9]\d*/5000", seen):
        assert time.monotonic() < deadline and process.poll() is None, seen
        seen += process.stderr.readline()
    children = children_of(process.pid)
    assert len(children) == 2
    killed = time.monotonic()
    os.kill(children[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 40
    assert process.returncode == 1
    assert "\r" not in seen
    first, then = [line for line in errors.splitlines() if line.startswith("megatron-comp: ")]
    assert first.startswith("megatron-comp: error on rank 1: was killed")
    assert re.match(r"megatron-comp: then an error on rank 0: \w*Error", then), errors
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_one_line(errors, message):
    lines = [line for line in errors.splitlines() if line.startswith("megatron-comp: error")]
    assert len(lines) == 1, errors
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in errors
