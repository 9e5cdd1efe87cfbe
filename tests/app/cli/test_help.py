"""What `--help` tells: everything that can be said has words, and the words are shown."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main
from support.cli import FedbusCli

from fedbus.app.cli.main import app


def commands(
    of: click.Command, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands under *of*, each with the words that call it."""
    if isinstance(of, click.Group):
        for name, command in of.commands.items():
            yield from commands(command, (*words, name))
    else:
        yield words, of


COMMANDS = dict(commands(typer.main.get_command(app)))
each_command = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


@each_command
def test_a_command_and_all_that_it_takes_has_words(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name


async def test_what_stands_in_brackets_is_shown_too(tmp_path: Path) -> None:
    said = (await FedbusCli(tmp_path)("trace", "--help")).out
    assert "the newest that is kept" in said
    assert "the terminal's" in said


async def test_an_argument_is_explained_in_the_terminal(tmp_path: Path) -> None:
    assert "The run, as `fedbus run ls` calls it." in (await FedbusCli(tmp_path)("run", "show", "--help")).out
