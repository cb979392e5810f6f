import json
import sys

NEW = 8
PROMPT = "The three branches of the government of the United States are"
ARGUMENTS = ("--tp", 3, "--prompt", PROMPT, "--new-tokens", NEW)


def test_own_ranks_and_torchrun_give_one_text(command, real_command, smollm2, tmp_path):
    """Also: what the JSON holds, and that every reduction was compressed."""
    arguments = ("generate", "--model", smollm2, *ARGUMENTS, "--codec", "mxfp4", "--json")
    own = command(*arguments, tmp_path / "own.json")
    assert own.returncode == 0, own.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    torchrun = real_command(*arguments, tmp_path / "torchrun.json", launcher=[*torchrun, "-m", "megatron_comp.cli"])
    assert torchrun.returncode == 0, torchrun.stderr

    content = json.loads((tmp_path / "own.json").read_text())
    assert set(content) == {"config", "versions", "rows"}
    assert {"megatron_comp", "torch", "megatron-core"} <= set(content["versions"])
    (row,) = content["rows"]
    assert row["text"].startswith(PROMPT) and row["text"] in own.stdout
    assert row["text"] == json.loads((tmp_path / "torchrun.json").read_text())["rows"][0]["text"]

    # Two reductions in each of 30 layers, in the prefill and for each token after the first.
    assert (row["new_tokens"], row["compressed_calls"], row["kept_calls"]) == (NEW, 60 * NEW, 0)
    # Two ranks send messages of mxfp4: half a byte a value and a byte for 32, each section padded to 16 bytes.
    message = row["prompt_tokens"] * 576 // 2 + -(-row["prompt_tokens"] * 18 // 16) * 16
    assert row["prefill_bytes_per_rank"] == 60 * 2 * message
    assert row["decode_bytes_per_rank"] == 60 * (NEW - 1) * 2 * (288 + 32)


def test_policy_file_keeps_decode(command, smollm2, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("codec: int8:32:fp16\nmin_bytes: 0\nphases: {decode: none}\n")
    done = command("generate", "--model", smollm2, "--policy", policy, "--json", tmp_path / "out.json", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["compressed_calls"] == 60
    assert row["kept_calls"] == 60 * (row["new_tokens"] - 1)
    assert row["kept_because"] == {"policy": row["kept_calls"]}
