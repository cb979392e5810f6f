# SPDX-License-Identifier: Apache-2.0
"""Megatron scripts as they are, compressed by `python -m megatron_comp.run` or `import megatron_comp.auto`."""

import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "examples" / "stock_gpt.py"
RANKS = 2
POLICY = "codec: int8:32:fp16\nmin_bytes: 0\nlayers: {1: {mlp: none}}\n"


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]


def environment(path=REPO, **more):
    path = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **more}


def started(*words, ranks=None, **more):
    """What Python gave for these words, or RANKS of it: in forked processes."""
    argv = [sys.executable, *words]
    return commands.run(commands.on_ranks(ranks, argv) if ranks else argv, environment(**more), REPO)


def really_started(*command, **more):
    """What a command gave in a new process."""
    command = list(map(str, command))
    return subprocess.run(command, env=environment(**more), cwd=REPO, capture_output=True, text=True, timeout=120)


def tokens(result):
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("2 3 4")]
    return line


def said(result):
    return [line for line in result.stderr.splitlines() if line.startswith("megatron_comp")]


@pytest.fixture(scope="module")
def stock():
    return tokens(started(SCRIPT, ranks=RANKS))


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def test_a_script_is_compressed_as_it_is(stock, policy):
    result = started("-m", "megatron_comp.run", "--policy", policy, SCRIPT, "--new-tokens", "8", ranks=RANKS)
    assert tokens(result) == stock  # int8 leaves the greedy tokens of this model alone
    built, sent = said(result)
    assert built.startswith("megatron_comp: GPTModel: 3 of 4 sums have a codec, policy {")
    assert "int8:32:fp16" in built
    # One prefill and seven steps of decoding; hidden 96 as 3 blocks: 96 + 3 * 2 bytes per token and sum, padded to 16.
    assert sent.startswith("megatron_comp: GPTModel: 24 sums compressed (gather_sum 24), 8 uncompressed (policy 8), ")


def test_another_codec_gives_another_text(stock):
    """So the sums of the script are the compressed ones."""
    result = started(*["-m", "megatron_comp.run", "--codec", "int2:32:fp16", "--min-bytes", "0k"], SCRIPT, ranks=RANKS)
    assert tokens(result) != stock


@pytest.mark.parametrize(
    "options, sums",
    [((), "gather_sum 16"), (("--expert-parallel", "2"), "gather_sum 8, reduce_scatter 8")],
    ids=["experts split", "experts whole"],
)
def test_a_mixture_of_experts_is_compressed(options, sums):
    """Without expert parallelism tokens stay where they are; with it they are gathered, and their sums scattered."""
    script, codec = [SCRIPT, "--new-tokens", "4", "--experts", "4", *options], ["--codec", "int8:32:fp16"]
    result = started("-m", "megatron_comp.run", *codec, "--min-bytes", "0", *script, ranks=RANKS)
    assert tokens(result) == tokens(started(*script, ranks=RANKS))
    assert said(result)[-1].startswith(f"megatron_comp: GPTModel: 16 sums compressed ({sums}), 0 uncompressed")


def test_a_module_is_run_as_one(stock, policy, tmp_path):
    package = tmp_path / "somebody"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "serve.py").write_text(SCRIPT.read_text())
    command = ["-m", "megatron_comp.run", "--policy", policy, "-m", "somebody.serve", "--new-tokens", "8"]
    result = started(*command, ranks=RANKS, path=tmp_path)
    assert tokens(result) == stock
    assert len(said(result)) == 2


def test_an_import_does_the_same(stock, policy, tmp_path):
    script = tmp_path / "own.py"
    script.write_text("import megatron_comp.auto\n" + SCRIPT.read_text())
    result = started(script, ranks=RANKS, MEGATRON_COMP_POLICY=str(policy))
    assert tokens(result) == stock
    assert said(result)[0].startswith("megatron_comp: GPTModel: 3 of 4 sums have a codec")


def test_a_policy_that_the_model_cannot_follow_ends_every_rank(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("codec: mxfp4\nlayers: {7: none}\n")
    result = started("-m", "megatron_comp.run", "--policy", path, SCRIPT, ranks=RANKS)
    assert result.returncode != 0
    assert "policy: layers: 7 is out of range; the model has layers 0 to 1" in result.stderr


BY_RANK = "import os, sys; given = sys.argv.pop(1) if os.environ['RANK'] == '0' else 'absent.yaml'\n"


@pytest.mark.parametrize(
    "start",
    [
        "from megatron_comp.run import main; sys.exit(main(['--policy', given, *sys.argv[-1:]]))",
        "os.environ['MEGATRON_COMP_POLICY'] = given; import megatron_comp.auto, runpy\n"
        "script, sys.argv = sys.argv[-1], ['']; runpy.run_path(script, run_name='__main__')",
    ],
    ids=["run", "auto"],
)
def test_a_policy_that_one_rank_cannot_read_ends_every_rank(policy, start):
    """Left alone, the others would wait for the rank that has ended, in `init_process_group`."""
    result = started("-c", BY_RANK + start, policy, SCRIPT, ranks=RANKS)
    assert result.returncode != 0
    assert "megatron_comp: rank 1: absent.yaml: No such file or directory; all ranks end" in result.stderr
    ends = [line for line in result.stderr.splitlines() if line.startswith("ValueError: ")]
    assert ends == ["ValueError: rank 1: absent.yaml: No such file or directory"] * RANKS, result.stderr


ENDS = {
    "os._exit": "import os; os._exit(0)",
    "SIGTERM": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "SIGINT": (  # which programs that a shell started in the background ignore
        "import os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    ),
    "a signal that the script handles": (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    ),
    "groups that are left as they are": "",
}
IN_NEW_PROCESSES = "groups that are left as they are"  # under torchrun, as users start them


@pytest.mark.parametrize("end", ENDS)
def test_what_was_sent_is_said_however_the_script_ends(policy, tmp_path, end):
    """As servers end, and scripts with CUDA graphs: neither returns to whoever started it.

    Groups that are left as they are: nothing of ours may keep them alive for longer than the script does, else the
    interpreter aborts at its end. Measured on 2026-11-29 with examples/stock_gpt.py without its calls of `destroy_...`,
    two gloo ranks on a CPU that was busy with other work (load 5 to 100): of 35 runs under `megatron_comp.run` and of
    35 without it none aborted; one of either kind had written its text, but not ended within 300 s.
    """
    script = tmp_path / "ends.py"
    main = SCRIPT.read_text().replace("    parallel_state.destroy_model_parallel()\n", "")
    script.write_text(main.replace("    dist.destroy_process_group()\n", "") + ENDS[end])
    command = ["-m", "megatron_comp.run", "--policy", policy, script, "--new-tokens", "2"]
    result = really_started(*TORCHRUN, *command) if end == IN_NEW_PROCESSES else started(*command, ranks=RANKS)
    assert (result.returncode == 0) == (end not in ("SIGTERM", "SIGINT")), result.stderr
    sent = [line for line in said(result) if line.startswith("megatron_comp: ")][-1]  # torchrun has a line, too
    assert sent.startswith("megatron_comp: GPTModel: 6 sums compressed (gather_sum 6), 2 uncompressed (policy 2)")


def test_ranks_that_wait_in_a_collective_end_by_the_signal_alone(tmp_path):
    """A handler of Python's would not run there, and the rank would go on waiting."""
    script = tmp_path / "shows.py"
    script.write_text("import os, signal; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL); os._exit(0)")
    for rank, default in (("0", "False"), ("1", "True")):
        result = started("-m", "megatron_comp.run", "--codec", "mxfp4", script, RANK=rank)
        assert result.stdout.strip() == default


def test_a_model_that_is_gone_is_still_counted(policy, tmp_path):
    script = tmp_path / "forgets.py"
    script.write_text(SCRIPT.read_text() + "    import gc; gc.collect()\n")
    result = started("-m", "megatron_comp.run", "--policy", policy, script, "--new-tokens", "2", ranks=RANKS)
    assert said(result)[-1].startswith("megatron_comp: GPTModel: 6 sums compressed")


def test_a_helper_that_a_program_spawns_may_build_no_model(tmp_path, policy):
    """The program itself may not. Both are new processes: where nothing is forked the import sees how Python ends."""
    script = tmp_path / "spawns.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "import megatron_comp.auto\n"
        "def help_out(): print('helped', flush=True)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=help_out)\n"
        "    process.start(); process.join(); print(process.exitcode)\n"
    )
    result = really_started(sys.executable, script, MEGATRON_COMP_POLICY=str(policy))
    assert (result.returncode, result.stdout.split()) == (1, ["helped", "0"])
    assert said(result) == [f"megatron_comp.auto: {NOTHING}"]


NOTHING = "no Megatron language model was built in this process: nothing was compressed"


def test_a_script_without_a_model_is_an_error(tmp_path):
    script = tmp_path / "idle.py"
    script.write_text("import sys\nprint(sys.argv)\nsys.exit(0)\n")
    result = started("-m", "megatron_comp.run", "--codec", "mxfp4", script, "--codec", "its own")
    assert result.returncode == 1
    assert result.stdout.strip() == str([str(script), "--codec", "its own"])
    assert said(result) == [f"megatron_comp.run: {script}: {NOTHING}"]


def test_a_script_keeps_its_own_exit_status(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys\nsys.exit(7)\n")
    assert started("-m", "megatron_comp.run", "--codec", "mxfp4", script).returncode == 7


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--codec", "fp9", SCRIPT], "codec 'fp9' is neither a preset"),
        (["--codec", "mxfp4", "absent.py"], "absent.py: no such script"),
        (["--codec", "mxfp4"], "give a script, or -m and a module"),
        (["--policy", "absent.yaml", SCRIPT], "absent.yaml"),
        (["--policy", "p.yaml", "--min-bytes", "0", SCRIPT], "--min-bytes goes with --codec"),
        ([SCRIPT], "one of the arguments --policy --codec is required"),
    ],
    ids=["codec", "script", "no script", "policy", "min-bytes", "neither"],
)
def test_bad_input_is_one_line(arguments, complaint):
    result = started("-m", "megatron_comp.run", *arguments)
    assert result.returncode == 2
    assert complaint in result.stderr.splitlines()[-1]


def test_the_import_needs_a_policy():
    result = started("-c", "import megatron_comp.auto", MEGATRON_COMP_POLICY="")
    assert result.returncode == 1
    assert "megatron_comp.auto needs MEGATRON_COMP_POLICY, the path of a policy file" in result.stderr


def test_the_import_names_a_policy_that_is_missing():
    result = started("-c", "import megatron_comp.auto", MEGATRON_COMP_POLICY="absent.yaml")
    assert result.returncode == 1
    assert "megatron_comp.auto: MEGATRON_COMP_POLICY=absent.yaml: No such file or directory" in result.stderr


def test_the_harnesss_own_class_for_megatron_is_compressed(tmp_path):
    """`megatron_lm` of lm_eval as it is, on a stand-in for Megatron-LM's package `megatron.training`."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra 'tasks'")
    (tmp_path / "iter_0000001").mkdir()
    support = REPO / "tests" / "support"
    script = (support / "stock_harness.py", tmp_path, RANKS)
    launched = {"ranks": RANKS, "MEGATRON_PATH": str(support / "megatron_lm")}
    stock = started(*script, **launched)
    assert stock.returncode == 0, stock.stderr[-3000:]
    result = started("-m", "megatron_comp.run", "--codec", "int8:32:fp16", "--min-bytes", "0", *script, **launched)
    assert result.returncode == 0, result.stderr[-3000:]
    built, sent = said(result)[-2:]
    assert "GPTModel: 4 of 4 sums have a codec" in built
    assert sent.startswith("megatron_comp: GPTModel: 12 sums compressed (gather_sum 12), 0 uncompressed")
    before, after = ([float(word) for word in each.stdout.split()[:3]] for each in (stock, result))
    assert before != after == pytest.approx(before, abs=0.2)  # int8 changes such a model's figures by 0.04
