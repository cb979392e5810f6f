# SPDX-License-Identifier: Apache-2.0
"""Tables of subcommands: a module each, which adds its arguments, checks them and runs."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Subcommands:
    """modules: by name of the subcommand, its module in this package and one line of help. dest: where argparse leaves
    the name.

    A module is imported when its subcommand is chosen: most need torch, which takes a second to import. Its DESCRIPTION
    says what it does, and its EPILOG, if it has one, what a user reads last. RENAMED, if it has any, maps options of
    earlier versions to those that took their place.
    """

    dest: str
    modules: Mapping[str, tuple[str, str]]

    def add_to(self, parser: argparse.ArgumentParser, epilog: str | None = None) -> None:
        """epilog: of modules that have none of their own."""
        subparsers = parser.add_subparsers(
            dest=self.dest, required=True, metavar=self.dest.upper(), parser_class=_LazyParser
        )
        for name, (module, help_) in self.modules.items():
            subparsers.add_parser(name, help=help_, fill=lambda made, module=module: _fill(made, _load(module), epilog))

    def chosen(self, args: argparse.Namespace) -> ModuleType:
        return _load(self.modules[getattr(args, self.dest)][0])


class _LazyParser(argparse.ArgumentParser):
    """Gets its description and its arguments from `fill` when it is first used."""

    def __init__(self, *args: object, fill: Callable[[argparse.ArgumentParser], None], **more: object) -> None:
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
        self._fill: Callable[[argparse.ArgumentParser], None] | None = fill
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


def _fill(parser: argparse.ArgumentParser, module: ModuleType, epilog: str | None) -> None:
    parser.description = module.DESCRIPTION
    parser.epilog = getattr(module, "EPILOG", epilog)
    parser.renamed = getattr(module, "RENAMED", {})
    module.add_arguments(parser)


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
