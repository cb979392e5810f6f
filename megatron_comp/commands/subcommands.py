# SPDX-License-Identifier: Apache-2.0
"""Tables of subcommands: `arguments/NAME.py` says what a user can say to one, `NAME.py` checks it and runs."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Subcommands:
    """modules: by name of the subcommand, its module in this package and one line of help. dest: where argparse leaves
    the name.

    The module of the same name in `arguments` is imported when its subcommand is named. Its DESCRIPTION says what the
    subcommand does, and its EPILOG, if it has one, what a user reads last. RENAMED, if it has any, maps options of
    earlier versions to those that took their place. SUBCOMMANDS, if it has one, is a table of its own subcommands.
    The module itself needs torch, which takes a second to import: that is left until it runs.
    """

    dest: str
    modules: Mapping[str, tuple[str, str]]

    def add_to(self, parser: argparse.ArgumentParser, epilog: str | None = None) -> None:
        """epilog: of modules that have none of their own."""
        subparsers = parser.add_subparsers(
            dest=self.dest, required=True, metavar=self.dest.upper(), parser_class=_LazyParser
        )
        for name, (module, help_) in self.modules.items():
            subparsers.add_parser(name, help=help_, fill=lambda made, module=module: _fill(made, module, epilog))

    def chosen(self, args: argparse.Namespace) -> ModuleType:
        """The module of what was named, in a table of its own where it has one."""
        module, _ = self.modules[getattr(args, self.dest)]
        inner = getattr(_arguments(module), "SUBCOMMANDS", None)
        return inner.chosen(args) if inner else _load(module)


class _LazyParser(argparse.ArgumentParser):
    """Gets its description and its arguments from `fill` when it is first used."""

    def __init__(self, *args: object, fill: "Callable[[_LazyParser], None]", **more: object) -> None:
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
        self._fill: Callable[[_LazyParser], None] | None = fill
        self.renamed: Mapping[str, str] = {}

    def parse_known_args(
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self._fill:
            self._fill, fill = None, self._fill
            fill(self)
        return super().parse_known_args([self._renamed(word) for word in args], namespace)

    def _renamed(self, word: str) -> str:
        option, equals, value = word.partition("=")
        return self.renamed.get(option, option) + equals + value


def _fill(parser: _LazyParser, module: str, epilog: str | None) -> None:
    arguments = _arguments(module)
    parser.description = arguments.DESCRIPTION
    parser.epilog = getattr(arguments, "EPILOG", epilog)
    parser.renamed = getattr(arguments, "RENAMED", {})
    arguments.add_arguments(parser)


def _arguments(module: str) -> ModuleType:
    return import_module(f".arguments.{module}", __package__)


def _load(module: str) -> ModuleType:
    """Ends the process with one line if a package of the extra `cli` is missing."""
    try:
        return import_module(f".{module}", __package__)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "megatron_comp"):
            raise
        raise SystemExit(
            f"megatron-comp: the Python package {missing} is missing: pip install 'megatron-comp[cli]'"
        ) from None
