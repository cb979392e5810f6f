"""Tables of subcommands: a module each, which adds its arguments, checks them and runs."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Subcommands:
    """modules: by name of the subcommand, the module and one line of help. dest: where argparse leaves the name.

    A module's docstring says after its first `: ` what it does, and its EPILOG, if it has one, what a user reads last.
    """

    dest: str
    modules: Mapping[str, tuple[ModuleType, str]]

    def add_to(self, parser: argparse.ArgumentParser, epilog: str | None = None) -> None:
        """epilog: of modules that have none of their own."""
        subparsers = parser.add_subparsers(dest=self.dest, required=True, metavar=self.dest.upper())
        for name, (module, help_) in self.modules.items():
            subparser = subparsers.add_parser(
                name,
                help=help_,
                description=module.__doc__.partition(": ")[2],
                epilog=getattr(module, "EPILOG", epilog),
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_arguments(subparser)

    def chosen(self, args: argparse.Namespace) -> ModuleType:
        return self.modules[getattr(args, self.dest)][0]
