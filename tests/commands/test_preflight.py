# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a model's folder, the environment or an output is said before any rank starts, in one line."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from characters import character_llama, character_tokenizer
from checkpoints import tiny_mixtral
from safetensors.torch import load_file, save_file

from megatron_comp import cli

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """In shards, so that one can be missing; four heads, two key-value heads."""
    shape = {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_shard_size": "60KB"}
    return Path(character_llama(tmp_path_factory.mktemp("source"), **shape))


@pytest.fixture
def model(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture
def main(capsys, monkeypatch):
    """main(*arguments, **environment) -> the one line that a command fails with, before any rank starts."""
    for name in (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_STEP_NUM_TASKS",
        "GLOO_SOCKET_IFNAME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli.ranks, "start", lambda *_, **__: pytest.fail("ranks were started"))

    def run(*arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        start = time.process_time()
        status = cli.main(list(map(str, arguments)))
        assert time.process_time() - start < 3
        errors = capsys.readouterr().err
        lines = [line for line in errors.splitlines() if line.startswith("megatron-comp: error")]
        assert status == 2 and len(lines) == 1 and "Traceback" not in errors, errors
        return lines[0]

    return run


def generate(model, *more, tp=2):
    return ("generate", "--model", model, "--tp", tp, "--prompt", "hello", *more)


def edit(folder, name="config.json", **changes):
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**content, **changes}))


def shard(folder, number=1):
    return sorted(folder.glob("*.safetensors"))[number]


def dangle(path):
    """A link into a cache, to a file that the download had not finished."""
    path.unlink(missing_ok=True)
    path.symlink_to("../../blobs/4d7a.incomplete")


def tokenizer_model_alone(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")


def leave_out(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"].pop(name)
    tensors = {each: tensor for each, tensor in load_file(path).items() if each != name}
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_bin(folder):
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


FOLDERS = {
    "rope_theta": (
        lambda f: edit(f, rope_theta="500000"),
        r"config.json: rope_theta is '500000'; allowed: a number above",
    ),
    "factor": (
        lambda f: edit(f, rope_scaling={"type": "linear", "factor": "4"}),
        r"config.json: rope_scaling: factor is '4'; allowed: a number above 0",
    ),
    "groups": (
        lambda f: edit(f, num_key_value_heads=0),
        r"num_key_value_heads is 0; allowed: an integer of at least 1",
    ),
    "quantized": (lambda f: edit(f, quantization_config={"quant_method": "awq"}), r"the weights are quantized by awq"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json is not valid JSON"),
    "byte order mark": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text(), encoding="utf-8-sig"),
        r"config.json is not valid JSON: it begins with a byte order mark",
    ),
    "layer types": (lambda f: edit(f, layer_types=5), r"layer_types is 5; only 'full_attention' is supported"),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").write_text("null"),
        r"index.json is not an index of safetensors shards: it has no weight_map",
    ),
    "hidden size": (
        lambda f: edit(f, hidden_size=10**12, head_dim=24),
        r"tensor model.embed_tokens.weight has shape \[128, 96\], expected \[128, 1000000000000\]",
    ),
    "layers": (
        lambda f: edit(f, num_hidden_layers=10**12),
        r"config.json: num_hidden_layers is 1000000000000, but the weights are of 2 layers",
    ),
    "a tensor left out": (
        lambda f: leave_out(f, "model.layers.1.mlp.up_proj.weight"),
        r"model: tensor model.layers.1.mlp.up_proj.weight is missing; expected one of shape \[144, 96\]",
    ),
    "index to no file": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": ".."}}'),
        r"index.json is not an index of safetensors shards: 'model.norm.weight' is in '..'",
    ),
    "page of a login": (lambda f: (f / "tokenizer.json").write_text("<html>"), r"tokenizer.json is not valid JSON"),
    "no model in the tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer.json is not a tokeni"),
    "tokenizer's settings": (lambda f: (f / "tokenizer_config.json").write_text("{"), r"_config.json is not valid JS"),
    "LFS config": (lambda f: (f / "config.json").write_text(POINTER), r"config.json is a pointer of git-lfs"),
    "LFS weights": (
        lambda f: shard(f).write_text(POINTER),
        r"model-00002-of-\d+.safetensors is a pointer of git-lfs.*git lfs p",
    ),
    "LFS index": (
        lambda f: (f / "model.safetensors.index.json").write_text(POINTER),
        r"index.json is a pointer of git-lfs",
    ),
    "LFS tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), r"tokenizer.json is a pointer of git-lfs"),
    "link of a shard": (
        lambda f: dangle(shard(f)),
        r"model-00002.* is a link to a file that is not there \(.*4d7a.incomplete\)",
    ),
    "link of the config": (lambda f: dangle(f / "config.json"), r"config.json is a link to a file that is not there"),
    "link of the index": (
        lambda f: dangle(f / "model.safetensors.index.json"),
        r"index.json is a link to a file that is",
    ),
    "link of the tokenizer": (
        lambda f: dangle(f / "tokenizer.json"),
        r"tokenizer.json is a link to a file that is not",
    ),
    "missing shard": (lambda f: shard(f).unlink(), r"model-00002-of-\d+.safetensors is missing"),
    "cut shard": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-10]),
        r"model-00002.* is damaged or incomplete \(\d+ by",
    ),
    "empty shard": (lambda f: shard(f).write_bytes(b""), r"model-00002.* is damaged or incomplete \(0 bytes\)"),
    "other weights": (only_bin, r"holds neither model.safetensors nor .*; pytorch_model.bin is not read"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"holds no tokenizer: expected one of tokenizer.json"),
    "tokenizer.model": (
        tokenizer_model_alone,
        r"tokenizer.model is a sentencepiece file, and .*cannot be imported: pip ins",
    ),
    "stops": (
        lambda f: edit(f, "generation_config.json", eos_token_id="2"),
        r"generation_config.json: eos_token_id is \"2\"",
    ),
}


@pytest.mark.parametrize("change, message", FOLDERS.values(), ids=FOLDERS)
def test_folders(main, model, monkeypatch, change, message):
    from re import search

    from megatron_comp.inference import model_files

    monkeypatch.setattr(model_files, "_there", lambda _module: False)  # sentencepiece, wherever this runs
    change(model)
    assert search(message, line := main(*generate(model))), line


def test_experts(main, tmp_path):
    folder = character_tokenizer(tiny_mixtral(tmp_path / "model"))
    edit(folder, num_experts_per_tok=5)
    assert "num_experts_per_tok is 5; allowed: 1 to num_local_experts, 4" in main(*generate(folder))


@pytest.mark.parametrize("tp", [3, 10])
@pytest.mark.parametrize("command", ["generate", "evaluate", "search", "convert", "bench ttft", "drop sensitivity"])
def test_heads(main, model, tmp_path, sotu_text, command, tp):
    text = ("--text", sotu_text, "--tokens", 64, "--context", 32)
    options = {
        "generate": ("--prompt", "hello"),
        "evaluate": text,
        "search": (*text, "--max-kl", 0.1, "--out", tmp_path / "policy.yaml"),
        "convert": ("--out", tmp_path / "out"),
        "bench ttft": ("--tokens", 16),
        "drop sensitivity": text,
    }[command]
    line = main(*command.split(), "--model", model, "--tp", tp, *options)
    assert f"tensor_parallel {tp} does not divide 4 attention heads; this model allows [1, 2, 4]" in line


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE=1, but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''; expected a launcher's number of ranks"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE='four'; expected a launcher's number of ranks"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'; expected"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'; expected"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but not MASTER_ADDR, MASTER_PORT"),
        (
            {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "--tp is 2, but the environment says",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "RANK='2'; allowed with WORLD_SIZE=2",
        ),
        ({"WORLD_SIZE": "2", "RANK": "", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "WORLD_SIZE=2, but not RANK"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": " ", "MASTER_PORT": "1"}, "WORLD_SIZE=2, but not MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "x"}, "MASTER_PORT='x'; allowed: 0 to 65"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "65536"},
            "MASTER_PORT='65536'; allowed: 0 to 65535",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "x", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "LOCAL_RANK='x'; allowed with WORLD_SIZE=2",
        ),
        ({"GLOO_SOCKET_IFNAME": "lo,eth99"}, "GLOO_SOCKET_IFNAME=lo,eth99; eth99 is not one of lo"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS='x', but srun has not numbered this process"),
        ({"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS='', but srun"),
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_NUM_TASKS='2', but srun has not numbered this process by SLURM_PRO",
        ),
    ],
    ids=str,
)
def test_left_over_variables(main, model, environment, message):
    line = main(*generate(model), **environment)
    assert (
        message in line
        and "the environment says" in line
        and any(word in line for word in ("`unset ", "; allowed", "not one of"))
    )


def test_stages(main, model):
    line = main(*generate(model), "--pp", 3)
    assert "pipeline_parallel is 3, but this model has 2 layers" in line
    meeting = {"RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    line = main(*generate(model), "--pp", 2, WORLD_SIZE="2", **meeting)
    assert "--tp is 2 and --pp 2, but the environment says WORLD_SIZE=2: start 4 ranks with torchrun" in line


@pytest.mark.parametrize("option", ["--json", "--csv", "--figure", "--out"])
@pytest.mark.parametrize("place", ["nowhere/file.svg", "/proc/file.svg", ".", "x" * 300])
def test_outputs(main, model, sotu_text, tmp_path, option, place):
    files = {"--json": "rows.json", "--csv": "rows.csv", "--figure": "figure.svg", "--out": "policy.yaml"}
    files = {name: tmp_path / file for name, file in files.items()} | {option: place}
    options = [each for pair in files.items() for each in pair]
    line = main(
        *("search", "--model", model, "--tp", 2, "--text", sotu_text, "--max-kl", 0.1, "--tokens", 64, "--context", 32),
        *options,
    )
    assert f"{option} {place}: " in line
    assert ("its folder does not exist" if place in ("nowhere/file.svg", ".") else "cannot be written: ") in line


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has 0 bytes, too few for 64 tokens"),
        ("We the people".encode("utf-16"), "is not UTF-8 text"),
        (b"caf\xe9 " * 99, "is not UTF-8 text"),
    ],
    ids=["empty", "utf-16", "latin-1"],
)
def test_texts(main, model, tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    words = ("evaluate", "--model", model, "--tp", 2, "--tokens", 70, "--context", 32)
    assert f"--text {tmp_path / 'text'} {message}" in main(*words, "--text", tmp_path / "text")


def test_weights_in_place_of_the_models(main, model, tmp_path):
    for content, message in ((POINTER, "is a pointer of git-lfs"), ("<html>", "is damaged or incomplete (6 bytes)")):
        (tmp_path / "weights").write_text(content)
        assert f"{tmp_path / 'weights'} {message}" in main(*generate(model, "--weights", tmp_path / "weights"))


def test_figures_need_matplotlib(main, model, sotu_text, tmp_path, monkeypatch):
    from megatron_comp.launcher import output

    monkeypatch.setattr(output.importlib.util, "find_spec", lambda _name: None)
    options = ("--text", sotu_text, "--max-kl", 0.1, "--tokens", 64, "--context", 32, "--out", tmp_path / "policy.yaml")
    line = main("search", "--model", model, "--tp", 2, *options, "--figure", tmp_path / "figure.svg")
    assert "--figure needs matplotlib: pip install matplotlib" in line


def test_without_torch(source):
    """All checks of environment, folder and text import neither torch nor transformers, nor does the command before."""
    code = (
        "import sys; from argparse import Namespace; from megatron_comp.commands import preflight\n"
        "args = Namespace(model=sys.argv[1], tp=2, text=sys.argv[1] + '/tokenizer.json')\n"
        "args.tokens = args.context = 64\n"
        "preflight.check_environment(args); preflight.check_inputs(args)\n"
        "print([name for name in ('torch', 'transformers', 'megatron.core') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr
    code = "import sys; sys.modules['torch'] = None; from megatron_comp import cli; sys.exit(cli.main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, *map(str, generate(source, tp=10))]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "tensor_parallel 10 does not divide 4 attention heads" in done.stderr, done.stderr
