# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from characters import character_llama
from command_line import COMMAND, command_environment

STOOD_IN = Path(__file__).parents[1] / "support" / "dynamic_engine.py"
NEW = 8
PROMPT = "The three branches of the government of the United States are"
ARGUMENTS = ("--tp", 3, "--prompt", PROMPT, "--new-tokens", NEW)


def test_a_text_of_a_real_model(command, smollm2, tmp_path):
    """What the JSON holds, and that every reduction was compressed."""
    done = command("generate", "--model", smollm2, *ARGUMENTS, "--codec", "mxfp4", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr

    content = json.loads((tmp_path / "out.json").read_text())
    assert set(content) == {"command", "config", "versions", "rows"}
    assert {"megatron_comp", "torch", "megatron-core"} <= set(content["versions"])
    (row,) = content["rows"]
    assert row["text"].startswith(PROMPT) and row["text"] in done.stdout

    # Two reductions in each of 30 layers, in the prefill and for each token after the first.
    assert (row["new_tokens"], row["compressed_calls"], row["kept_calls"]) == (NEW, 60 * NEW, 0)
    # Two ranks send messages of mxfp4: half a byte a value and a byte for 32, each section padded to 16 bytes.
    message = row["prompt_tokens"] * 576 // 2 + -(-row["prompt_tokens"] * 18 // 16) * 16
    assert row["prefill_bytes_per_rank"] == 60 * 2 * message
    assert row["decode_bytes_per_rank"] == 60 * (NEW - 1) * 2 * (288 + 32)


def test_own_ranks_and_torchrun_give_one_text(command, real_command, characters, tmp_path):
    arguments = ("generate", "--model", characters, "--tp", 2, "--prompt", "hello", "--new-tokens", NEW)
    arguments += ("--codec", "mxfp4", "--json")
    own = command(*arguments, tmp_path / "own.json")
    assert own.returncode == 0, own.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun = real_command(*arguments, tmp_path / "torchrun.json", launcher=[*torchrun, "-m", "megatron_comp.cli"])
    assert torchrun.returncode == 0, torchrun.stderr
    texts = [json.loads((tmp_path / name).read_text())["rows"][0]["text"] for name in ("own.json", "torchrun.json")]
    assert texts[0] == texts[1] != "h e l l o"


def test_policy_file_keeps_decode(command, characters, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("codec: int8:32:fp16\nmin_bytes: 0\nphases: {decode: none}\n")
    arguments = ("--tp", 2, "--prompt", "hello", "--new-tokens", NEW, "--json", tmp_path / "out.json")
    done = command("generate", "--model", characters, "--policy", policy, *arguments)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["compressed_calls"] == 2  # sums of its one layer
    assert row["kept_calls"] == 2 * (NEW - 1)
    assert row["kept_because"] == {"policy": row["kept_calls"]}


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """Tokens are characters; one of them is no ASCII."""
    from transformers import AutoTokenizer

    folder = character_llama(tmp_path_factory.mktemp("characters"), num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_stages_give_the_text_of_one_rank(command, tmp_path):
    """Compression is counted over all stages; bytes are those of the last one's ranks, with the activations."""
    folder, rows = character_llama(tmp_path / "model", num_hidden_layers=2), []
    for tp, pp, *codec in ((1, 1), (2, 2, "--codec", "int8:8:fp32", "--algorithm", "gather_sum")):
        size = ("--tp", tp, "--pp", pp, "--prompt", "hello", "--new-tokens", 3, "--json", tmp_path / "out.json")
        done = command("generate", "--model", folder, *size, *codec)
        assert done.returncode == 0, done.stderr
        rows += json.loads((tmp_path / "out.json").read_text())["rows"]
    one, both = rows
    assert both["text"] == one["text"] and (both["tp"], both["pp"]) == (2, 2)
    assert (both["compressed_calls"], both["kept_calls"]) == (2 * 2 * 3, 0)
    message = 96 + 12 * 4  # a row of 96 values, a scale for 8 of them
    assert both["prefill_bytes_per_rank"] == 5 * 96 * 4 + 2 * 5 * message
    assert both["decode_bytes_per_rank"] == 2 * (96 * 4 + 2 * message)


def short(model, prompt, *more):
    return ("generate", "--model", model, "--tp", 1, "--prompt", prompt, "--max-new-tokens", 2, *more)


def test_a_terminal_without_the_characters(smollm2_short, tmp_path):
    """What it cannot show is replaced there, and nothing is lost in the file. In a process of its own, whose Python
    reads the variable when it starts."""
    arguments = ("--tp", 1, "--prompt", "naïve 日本", "--max-new-tokens", 1, "--json", tmp_path / "out.json")
    argv = [*COMMAND, "generate", "--model", smollm2_short, *arguments]
    environment = command_environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(list(map(str, argv)), capture_output=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["text"].startswith("naïve 日本") and b"na?ve ??" in done.stdout


def test_a_prompt_that_is_no_text(command, characters):
    done = command(*short(characters, os.fsdecode(b"abc\xff")))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1:] == [
        "megatron-comp: error: --prompt is not UTF-8 text: byte 0xff at character 3"
    ]


def test_a_reader_that_leaves(characters, tmp_path):
    """As `head -c 1` does: the rest of the output goes nowhere, files are written, and nothing is said."""
    arguments = short(characters, "hello", "--json", tmp_path / "out.json")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env=command_environment(),
        )
    finally:
        os.close(writing)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower() and "broken" not in done.stderr.lower(), done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["new_tokens"] == 2


def test_chat(command, characters, llama, tmp_path):
    done = command(*short(characters, "hi", "--chat", "--json", tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["prompt_tokens"] == len("<user>hi")
    done = command(*short(llama, "hi", "--chat"))
    assert done.returncode == 2 and "has no chat template" in done.stderr


@pytest.mark.parametrize("tp", [1, 2])
def test_without_a_compiler(command, characters, tmp_path, tp):
    """One line says so, however many ranks and sums there are."""
    arguments = ("generate", "--model", characters, "--tp", tp, "--prompt", "hello", "--codec", "mxfp4")
    done = command(*arguments, CC="/nonexistent", MEGATRON_COMP_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("megatron-comp: warning: ")]
    expected = (
        "megatron-comp: warning: codecs run in plain torch, 7 to 24 times slower: no C compiler was found (tried "
    )
    assert [line.startswith(expected + "/nonexistent)") for line in told] == [True] * (tp > 1)


def test_warnings_of_the_loader(command, characters, tmp_path):
    import shutil

    folder = shutil.copytree(characters, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "query_scale": 2}))
    done = command("generate", "--model", folder, "--tp", 2, "--prompt", "hello")
    told = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert told == [
        f"megatron-comp: warning: {folder}/config.json: unknown keys, which have no effect here: query_scale"
    ]


def test_several_prompts(command, characters, tmp_path):
    """With the dynamic engine, whose attention is plain torch here: the texts of each prompt alone."""
    alone = []
    for prompt in ("hello", "ab"):
        done = command(*short(characters, prompt, "--json", tmp_path / "out.json"))
        assert done.returncode == 0, done.stderr
        alone += json.loads((tmp_path / "out.json").read_text())["rows"]
    arguments = short(characters, "hello", "--prompt", "ab", "--engine", "dynamic", "--json", tmp_path / "out.json")
    stood_in = commands.on_ranks(1, [sys.executable, STOOD_IN, "megatron_comp.cli", *arguments])
    done = commands.run(stood_in, command_environment())
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["text"] == "\n\n".join(each["text"] for each in alone)
    assert row["new_tokens"] == sum(each["new_tokens"] for each in alone)
    assert row["prompt_tokens"] == len("helloab") and row["ttft_ms"] > 0


def test_engines_that_cannot(command, characters):
    done = command(*short(characters, "hello", "--prompt", "ab"))
    assert done.returncode == 2 and "--engine static takes one --prompt; --engine dynamic takes several" in done.stderr
    done = command(*short(characters, "hello", "--engine", "dynamic"))
    assert done.returncode == 2 and "the dynamic engine needs flash-attn 2.7.3 or newer, and a GPU" in done.stderr
