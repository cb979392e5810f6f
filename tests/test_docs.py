# SPDX-License-Identifier: Apache-2.0
"""README and docs: links lead somewhere, commands parse, examples and figures are what the code and the rows say."""

import csv
import re
import shlex
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from pathlib import Path

import pytest

import megatron_comp as mc
from megatron_comp import cli

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")]
PAGES += sorted([*REPO.glob("docs/*.md"), *REPO.glob("megatron_comp/*/README.md"), *REPO.glob("examples/**/*.md")])
GUIDES = [page for page in PAGES if page.parent in (REPO, REPO / "docs")]


def name_of(page):
    return str(page.relative_to(REPO))


def blocks(page, language):
    """What stands in its fences of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def commands(page):
    """The arguments of every `megatron-comp ...` in its shell blocks, with variables that the block sets."""
    for block in blocks(page, "bash"):
        lines = block.replace("\\\n", " ").splitlines()
        ours = [line for line in lines if re.match(r"(\w+=\"|megatron-comp )", line)]
        ours += [line.partition(" -- ")[2] for line in lines if " -- megatron-comp " in line]
        shell = "megatron-comp() { printf '%q ' \"$@\"; echo; }\n" + "\n".join(ours)
        done = subprocess.run(["bash", "-c", shell], cwd=REPO, capture_output=True, text=True, check=True)
        yield from (shlex.split(line) for line in done.stdout.splitlines())


def test_commands_are_found():
    assert len(list(commands(REPO / "README.md"))) == 4
    assert sum(len(list(commands(page))) for page in GUIDES) > 12


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_parse(page, capsys):
    for arguments in commands(page):
        try:
            cli._parser().parse_args(arguments)
        except SystemExit as end:
            assert end.code == 0, (arguments, capsys.readouterr().err)
        for option, value in zip(arguments, arguments[1:]):
            if option == "--policy" and "/" in value:
                mc.CompressionPolicy.from_file(REPO / value)


def test_the_example_of_the_policy_reference(tmp_path):
    (example,) = blocks(REPO / "docs/policy.md", "yaml")
    file = tmp_path / "policy.yaml"
    file.write_text(example)
    policy = mc.CompressionPolicy.from_file(file)
    words = {
        (layer, site): policy.word(layer, site, "prefill") for layer in (0, 5, 20, 29) for site in ("attention", "mlp")
    }
    assert words == {
        **{(0, "attention"): "int8:32:fp16", (0, "mlp"): "int8:32:fp16"},
        **{(5, "attention"): "int4:32:fp16:hadamard", (5, "mlp"): "int5:32:fp16:hadamard"},
        **{(20, "attention"): "drop", (20, "mlp"): "int5:32:fp16:hadamard"},
        **{(29, "attention"): "none", (29, "mlp"): "int5:32:fp16:hadamard"},
    }
    assert policy.word(5, "mlp", "decode") == "none"


def test_the_policy_reference_has_every_key():
    rows = re.findall(r"^\| `(\w+)` \| `?([\w]+)`? \|", (REPO / "docs/policy.md").read_text(), re.M)
    default = mc.CompressionPolicy()
    assert dict(rows) == {key.name: str(getattr(default, key.name) or "none") for key in fields(default)}


def test_the_code_of_readme():
    (code,) = blocks(REPO / "README.md", "python")
    compile(code, "README.md", "exec")
    used = set(re.findall(r"\bmc\.(\w+)", (REPO / "README.md").read_text()))
    assert len(used) >= 6 and used <= set(mc.__all__)


def test_the_wheel_of_the_recipe():
    name = f"dist/megatron_comp-{mc.__version__}-py3-none-any.whl"
    assert name in (REPO / "docs/machines-and-slurm.md").read_text()


def test_the_table_of_readme_is_that_of_the_results():
    with (REPO / "examples/results/2026-11-21_smollm2-135m_tp3_gloo.csv").open() as file:
        rows = {row["codec"]: row for row in csv.DictReader(file) if row["algorithm"] == "gather_sum"}
    table = re.findall(
        r"^\| `(\S+)` \| ([\d.]+) \| (\d+) \| (\S+) % \| (\S+) \|$", (REPO / "README.md").read_text(), re.M
    )
    assert len(table) == 3  # the fourth row is a policy
    for codec, bits, megabytes, increase, kl in table:
        row = {key: float(value) for key, value in rows[codec].items() if key not in ("codec", "algorithm")}
        assert bits == f"{row['bits_per_value']:.2f}" and megabytes == f"{row['bytes_per_rank'] / 1e6:.0f}"
        assert increase == f"{row['perplexity_increase_pct']:+.2f}" and kl == f"{row['kl']:.4f}"


@pytest.mark.parametrize("figure", [*REPO.glob("docs/*.svg"), *REPO.glob("examples/results/*.svg")], ids=name_of)
def test_text_in_figures_is_text(figure):
    texts = [element.text for element in ElementTree.parse(figure).iter("{http://www.w3.org/2000/svg}text")]
    assert len(texts) > 10
