# SPDX-License-Identifier: Apache-2.0
"""Imports run one way: a room knows only the rooms below it, and only some know Megatron or torch.distributed.

Files are parsed, not imported, so an import inside a function or under TYPE_CHECKING counts as well.
"""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

# Rooms from top to bottom, each with the modules that belong to it (and everything inside them).
ROOMS = {
    "research": ["research"],  # not in the wheel
    "examples": ["examples"],
    "commands": ["megatron_comp.cli", "megatron_comp.commands", "megatron_comp.run", "megatron_comp.auto"],
    "report": ["megatron_comp.report"],
    "search": ["megatron_comp.search"],
    "predict": ["megatron_comp.predict"],
    "bench": ["megatron_comp.bench"],
    "spd": ["megatron_comp.spd"],
    "quality": ["megatron_comp.quality"],
    "launcher": ["megatron_comp.launcher"],
    "public face": ["megatron_comp"],  # the package's own __init__.py and the names it exports
    "inference": ["megatron_comp.inference"],
    "layers": ["megatron_comp.layers"],
    "policy": ["megatron_comp.policy", "megatron_comp.policy_words"],
    "wire": ["megatron_comp.wire"],
    "kernels": ["megatron_comp.kernels"],
    "version": ["megatron_comp.version"],
    "files": ["megatron_comp.files", "megatron_comp.yaml_files"],
    "notices": ["megatron_comp.notices"],
}
ORDER = list(ROOMS)

# Packages that only some rooms may know.
OUTSIDE = {
    "argparse": {"research", "examples", "commands"},
    "megatron": {"research", "examples", "commands", "inference", "layers"},
    "torch.distributed": {
        *("research", "examples", "commands", "search", "bench", "quality", "launcher"),
        *("public face", "inference", "layers", "wire"),
    },
}


def is_inside(module, parent):
    return module == parent or module.startswith(parent + ".")


def room_of(module):
    """The room of a module, or of a name imported from one; None for a module outside the project."""
    matches = [(len(m), room) for room, modules in ROOMS.items() for m in modules if is_inside(module, m)]
    return max(matches)[1] if matches else None


def project_files(repo):
    """(file, module name) of every Python file that has a room. kernels/ counts as what its link makes it."""
    folders = {
        "research": "research",
        "examples": "examples",
        "megatron_comp": "megatron_comp",
        "kernels": "megatron_comp.kernels",
    }
    for folder, package in folders.items():
        for file in sorted((repo / folder).rglob("*.py")):
            if "megatron_comp/kernels/" not in file.as_posix():  # some Pythons follow the link
                parts = file.relative_to(repo / folder).with_suffix("").parts
                yield file, ".".join([package, *parts]).removesuffix(".__init__")


def imported_names(file, module):
    """(line, absolute dotted name) of everything that a file imports, and of each mention of torch.distributed."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"  # usable after a plain `import torch`


def violations(repo):
    found = []
    for file, module in project_files(repo):
        room, where = room_of(module), file.relative_to(repo)
        if room == "public face" and module != "megatron_comp":
            found.append(f"{where}: {module} belongs to no room; move it, or add it to a room of this test")
            continue
        for line, name in imported_names(file, module):
            target = room_of(name)
            for package, allowed in OUTSIDE.items():
                if is_inside(name, package) and room not in allowed:
                    found.append(f"{where}:{line}: {room} must not know {package}")
            if room == "examples" and target not in (None, "examples", "public face"):
                found.append(f"{where}:{line}: examples use the public face only, not {name}")
            if target and ORDER.index(target) < ORDER.index(room):
                found.append(f"{where}:{line}: {room} must not import {name} of the room {target} above it")
            if is_inside(name, "kernels"):
                found.append(f"{where}:{line}: the kernels are called megatron_comp.kernels, not {name}")
    return found


def test_imports_run_one_way():
    assert violations(REPO) == []


def circles(repo):
    """Modules that import themselves by way of others. A name imported from a package counts as its module."""
    modules = {module: file for file, module in project_files(repo)}
    imports = {module: set() for module in modules}
    for module, file in modules.items():
        for _, name in imported_names(file, module):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                imports[module].add(target)
    while leaves := [module for module, targets in imports.items() if not targets]:
        for leaf in leaves:
            del imports[leaf]
        for targets in imports.values():
            targets.difference_update(leaves)
    return sorted(imports)


def test_no_module_imports_itself_by_way_of_others():
    assert circles(REPO) == []


def test_a_planted_circle_is_found(tmp_path):
    plant(tmp_path, "megatron_comp/search/solve.py", "from .tune import tune")
    (tmp_path / "megatron_comp/search/tune.py").write_text("def tune():\n    from . import solve")
    (tmp_path / "megatron_comp/search/bound.py").write_text("import math")
    assert circles(tmp_path) == ["megatron_comp.search.solve", "megatron_comp.search.tune"]


def test_no_package_holds_logic():
    """Its __init__.py hands names on. The public face's is the one that looks them up when they are first used."""
    for file, module in project_files(REPO):
        if file.name == "__init__.py" and module != "megatron_comp":
            kinds = {type(node) for node in ast.parse(file.read_text()).body}
            assert kinds <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign}, module


def test_files_are_seen():
    modules = {module for _, module in project_files(REPO)}
    assert {"research.published", "examples.fetch", "megatron_comp.wire.formats"} <= modules


@pytest.mark.parametrize(
    "path, source, complaint",
    [
        ("megatron_comp/wire/codec.py", "from megatron.core import parallel_state", "wire must not know megatron"),
        ("megatron_comp/wire/codec.py", "def f():\n    import megatron.core", "wire must not know megatron"),
        ("megatron_comp/wire/codec.py", "from ..policy import CompressionPolicy", "above it"),
        ("megatron_comp/wire/__init__.py", "from .. import policy", "above it"),
        ("megatron_comp/wire/codec.py", "from megatron_comp import Codec", "public face above it"),
        ("megatron_comp/policy.py", "from megatron_comp.layers.apply import apply_compression", "above it"),
        ("megatron_comp/policy.py", "from torch import distributed", "policy must not know torch.distributed"),
        ("megatron_comp/policy.py", "import torch\nN = torch.distributed.get_world_size()", "must not know torch.dist"),
        ("megatron_comp/layers/apply.py", "from megatron_comp.inference import hf", "inference above it"),
        ("megatron_comp/inference/model.py", "import megatron_comp.commands.evaluate", "commands above it"),
        ("megatron_comp/quality/judge.py", "from ..spd.weights import begin", "spd above it"),
        ("megatron_comp/spd/weights.py", "from ..predict import models", "predict above it"),
        ("megatron_comp/predict/models.py", "from ..search import solve", "search above it"),
        ("megatron_comp/search/solve.py", "from ..commands import options", "commands above it"),
        ("megatron_comp/commands/plan.py", "from research import published", "research above it"),
        ("megatron_comp/launcher/ranks.py", "from ..quality import metrics", "quality above it"),
        ("megatron_comp/search/solve.py", "import megatron.core", "search must not know megatron"),
        ("megatron_comp/__init__.py", "import megatron.core", "public face must not know megatron"),
        ("megatron_comp/helpers.py", "import os", "belongs to no room"),
        ("kernels/encode.py", "import torch.distributed as dist", "kernels must not know torch.distributed"),
        ("kernels/encode.py", "from megatron_comp.wire.formats import FORMATS", "wire above it"),
        ("kernels/encode.py", "from ..wire import formats", "wire above it"),
        ("megatron_comp/wire/codec.py", "from kernels import encode", "called megatron_comp.kernels"),
        ("examples/six_lines.py", "from megatron_comp.wire import codec", "public face only"),
    ],
)
def test_a_planted_import_is_found(tmp_path, path, source, complaint):
    plant(tmp_path, path, source)
    found = violations(tmp_path)
    assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "megatron_comp/wire/codec.py",
            "import torch.distributed as d\nfrom .. import kernels\nfrom . import formats",
        ),
        (
            "megatron_comp/layers/apply.py",
            "import megatron.core\nfrom megatron_comp import policy\nfrom .. import wire",
        ),
        ("megatron_comp/__init__.py", "from .layers import apply_compression\nfrom .policy import CompressionPolicy"),
        ("megatron_comp/cli.py", "import megatron_comp\nfrom .commands import evaluate"),
        ("kernels/encode.py", "import torch\nfrom .bits import pack\nfrom megatron_comp.kernels.bits import unpack"),
        ("examples/six_lines.py", "import megatron_comp as mc\nfrom megatron_comp import Codec\nimport megatron.core"),
    ],
)
def test_a_proper_import_passes(tmp_path, path, source):
    plant(tmp_path, path, source)
    assert violations(tmp_path) == []


def plant(repo, path, source):
    (repo / path).parent.mkdir(parents=True)
    (repo / path).write_text(source)
