# SPDX-License-Identifier: Apache-2.0
"""The built wheel carries the linked kernels/ folder, and the name `kernels` is left to the package that owns it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
LINK = REPO / "megatron_comp" / "kernels"


def python(*args, cwd, **environment):
    """What a Python process prints, with the PYTHONPATH that is given here or none."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    result = subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build residue stays in the tree, with the setuptools that is installed."""
    source = tmp_path_factory.mktemp("source") / "repository"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    for name in ("megatron_comp", "kernels"):
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist() if not name.endswith("/")}


def test_wheel_holds_every_module(members):
    expected = {file.relative_to(REPO).as_posix() for file in REPO.glob("megatron_comp/**/*.py")}
    expected |= {"megatron_comp/" + file.relative_to(REPO).as_posix() for file in REPO.glob("kernels/**/*.py")}
    expected |= {file.relative_to(REPO).as_posix() for file in REPO.glob("megatron_comp/wire/c/*.[ch]")}
    expected |= {"megatron_comp/kernels/README.md", "megatron_comp/py.typed"}
    assert expected == {name for name in members if ".dist-info/" not in name}
    assert members["megatron_comp/wire/c/native.c"] == (REPO / "megatron_comp/wire/c/native.c").read_text()


def test_wheel_metadata(members):
    info = {Path(name).name: text for name, text in members.items() if ".dist-info/" in name}
    assert "\nName: megatron-comp\n" in info["METADATA"]
    assert "\nLicense-Expression: Apache-2.0\n" in info["METADATA"]
    assert info["LICENSE"] == (REPO / "LICENSE").read_text()
    assert "megatron-comp = megatron_comp.cli:main" in info["entry_points.txt"]
    required = re.findall(r"^Requires-Dist: (\S+?)(?:[<>=]\S+)?$", info["METADATA"], re.M)
    assert required == ["torch", "PyYAML"], "without an extra"
    assert set(re.findall(r"^Provides-Extra: (\S+)$", info["METADATA"], re.M)) == {
        *("megatron", "cli", "plot", "tasks", "te", "test"),
        "bench",  # the former name of plot
    }


def test_installed_wheel_imports_its_kernels_elsewhere(wheel, tmp_path):
    target = tmp_path / "installed"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    python(*install, cwd=tmp_path)
    code = "import megatron_comp.kernels as k; print(*k.__path__, sep='\\n')"
    found = python("-c", code, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    assert found == [str(target / "megatron_comp" / "kernels")]


def test_checkout_imports_its_kernels():
    code = "import megatron_comp.kernels as k; print(*k.__path__, sep='\\n')"
    found = python("-c", code, cwd=REPO).splitlines()
    assert [Path(path).resolve() for path in found] == [REPO / "kernels"]


def test_the_name_kernels_is_not_ours():
    """Without an __init__.py our folder is at most a namespace portion: any real package of that name wins over it."""
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec.origin if spec else None)"
    origin = python("-c", code, cwd=REPO).strip()
    assert origin == "None" or REPO / "kernels" not in Path(origin).resolve().parents
    assert not (REPO / "kernels" / "__init__.py").exists()


def test_a_package_called_kernels_wins_from_the_repository_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'someone else'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.OWNER)"
    assert python("-c", code, cwd=REPO).strip() == "someone else"


def test_the_link_is_a_symbolic_link_in_git():
    assert LINK.is_symlink() and os.readlink(LINK) == "../kernels"
    command = ["git", "-C", str(REPO), "ls-files", "--stage", "megatron_comp/kernels"]
    if (REPO / ".git").exists():
        tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert tracked.startswith("120000 "), "megatron_comp/kernels is not in git as a link"


# What torch and PyYAML import, and what they in turn require.
NEEDED = "torch torchgen functorch filelock typing_extensions sympy mpmath networkx jinja2 markupsafe fsspec yaml _yaml"

WITH_TORCH_AND_YAML_ALONE = """
import sys

allowed = {*sys.stdlib_module_names, "megatron_comp", *sys.argv[3].split()}


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
import torch
import torch.distributed as dist

import megatron_comp as mc

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
of_ranks = [torch.randn(4, 96, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
total = mc.all_reduce(of_ranks[rank], mc.Codec.parse("int8:32:fp32"))
assert (total - sum(of_ranks)).abs().max() < 0.05, total
everyone = [torch.empty_like(total) for _ in range(2)]
dist.all_gather(everyone, total)
assert torch.equal(*everyone)
assert torch.equal(mc.reduce_scatter(of_ranks[rank], "int8:32:fp32"), total.chunk(2)[rank])
mc.CompressionPolicy(codec="mxfp4", layers={"0-2": "none"})
try:
    mc.apply_compression
except ImportError as error:
    print(error)
dist.destroy_process_group()
"""


def test_sums_need_torch_and_yaml_alone(tmp_path):
    """Two ranks over gloo, in processes where nothing else can be imported."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MEGATRON_COMP_CALIBRATION": "assumed"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WITH_TORCH_AND_YAML_ALONE, str(rank), str(tmp_path / "store"), NEEDED],
            env=environment,
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for out, errors in [rank.communicate(timeout=120) for rank in ranks]:
        assert out == "megatron_comp.apply_compression needs Megatron-Core: pip install 'megatron-comp[megatron]'\n", (
            errors
        )
    assert [rank.returncode for rank in ranks] == [0, 0]


def test_the_command_line_without_its_extra():
    """Names the missing package and the extra in one line; `--version` needs none."""
    code = "import sys; sys.modules['tqdm'] = None; from megatron_comp import cli; sys.exit(cli.main(sys.argv[1:]))"
    generate = ["generate", "--model", "nowhere", "--tp", "2", "--prompt", "Hello"]
    done = subprocess.run([sys.executable, "-c", code, *generate], cwd=REPO, capture_output=True, text=True)
    said = "megatron-comp: the Python package tqdm is missing: pip install 'megatron-comp[cli]'\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert python("-c", code, "--version", cwd=REPO).startswith("megatron_comp ")
