"""Commands that are imported when they run.

`fedbus --help` and shell completion show a table of names and help lines and import no command; a command's module,
with all that it imports, is loaded when the command is called or shows its own help.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import click
import typer
from typer.core import TyperGroup


class CommandEntry(NamedTuple):
    """A command in the table."""

    target: str
    """``module:function``; the options come from the function's parameters."""
    help: str
    """The first line of the function's docstring."""


class GroupEntry(NamedTuple):
    """A group in the table."""

    help: str
    commands: "CommandTable"


CommandTable: TypeAlias = Mapping[str, CommandEntry | GroupEntry]


class LazyCommand(click.Command):
    """A command that is known by its name and help line until it is called."""

    def __init__(self, name: str, entry: CommandEntry) -> None:
        super().__init__(name, help=entry.help)
        self.target = entry.target

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Return a context of the loaded command, which click then invokes instead of this one."""
        return self.load().make_context(info_name, args, parent, **extra)

    def load(self) -> click.Command:
        """Import the module and build the command from its function."""
        module, _, function = self.target.partition(":")
        loaded = typer.Typer(add_completion=False)
        loaded.command(self.name)(getattr(import_module(module), function))
        return typer.main.get_command(loaded)


class LazyGroup(TyperGroup):
    """A group of lazy commands; its own groups are lazy too."""

    def __init__(self, *, table: CommandTable, **attributes: Any) -> None:
        super().__init__(
            **attributes
            | {"commands": dict(_build_commands(table)), "suggest_commands": False}  # click suggests them too
        )


def _build_commands(table: CommandTable) -> Iterator[tuple[str, click.Command]]:
    for name, entry in table.items():
        match entry:
            case CommandEntry():
                yield name, LazyCommand(name, entry)
            case GroupEntry():
                yield name, LazyGroup(name=name, help=entry.help, no_args_is_help=True, table=entry.commands)
