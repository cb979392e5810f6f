# SPDX-License-Identifier: Apache-2.0
"""YAML that cannot exhaust memory: policies and calibrations."""

import re
from pathlib import Path

import yaml

from .files import shown

# Of a YAML file. Policies and calibrations take a few kilobytes; PyYAML reads about 200 of them per second.
MAX_BYTES = 1 << 20
MAX_VALUES = 200_000
MAX_DEPTH = 32
MAX_DIGITS = 100


def read_yaml(path: str | Path, what: str) -> object:
    """The content of a small YAML file; `what` names its kind in errors, as in `policy file`.

    Stricter than YAML: a mapping may name a key once (one that it merges by `<<` may be overruled), and a file may
    neither be large nor nest deeply, nor stand for more than 200,000 values once its aliases are resolved. Numbers are
    plain decimals.

    Raises ValueError for what cannot be read so, OSError if the file cannot be opened.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        return yaml.load(content.decode("utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        problem = str(error).replace('in "<unicode string>", ', "in ")  # the parser's name for what it was given
        raise ValueError(f"{what} {path} is not YAML: {problem}") from None


class _Loader(yaml.SafeLoader):
    """YAML without what multiplies, nests without end, or lets a later key replace an equal one without a word."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _error(f"it nests deeper than {MAX_DEPTH} levels", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_document(self) -> yaml.Node:
        node = super().compose_document()
        self._count(node, {}, set())
        return node

    def _count(self, node: yaml.Node, counts: dict[int, int], inside: set[int]) -> int:
        """How many values a node stands for once aliases are resolved; checks it and all in it."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in inside:
            raise _error("an alias stands inside of what it names", node)
        if id(node) not in counts:
            inside.add(id(node))
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
            parts = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
            counts[id(node)] = len(parts) + sum(self._count(part, counts, inside) for part in parts)
            inside.remove(id(node))
            if counts[id(node)] > MAX_VALUES:
                raise _error(f"it stands for more than {MAX_VALUES:,} values", node)
        return counts[id(node)]

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error("a list or a mapping is no key", key_node)
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node)
            if key in seen:
                raise _error(f"{shown(key)} is given more than once", node)
            seen.add(key)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:  # more than a float can hold, and more than a message should
            raise _error(f"a number of {len(node.value)} digits", node)
        return self._plain(node, super().construct_yaml_int(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return self._plain(node, super().construct_yaml_float(node))

    def _plain(self, node: yaml.ScalarNode, value: float) -> float:
        """The value, unless people read other digits: YAML takes 010 for 8, 0x10 for 16 and 1:30 for 90."""
        if not _PLAIN.fullmatch(node.value):
            raise _error(
                f"{node.value} stands for {value} in YAML: write {value}, or quotes around what is no number", node
            )
        return value


_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = re.compile(
    r"-?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|-?\.[0-9]+([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", re.I
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _error(problem: str, place: yaml.Node | yaml.Event) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)
