"""`--help`: the table of commands agrees with the commands, and showing it imports none of them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main
from support.cli import FedbusCli

from fedbus.app.cli.lazy import LazyCommand
from fedbus.app.cli.main import app

LIBRARIES = {
    *(
        "aiobotocore",
        "aiohttp",
        "cryptography",
        "flwr",
        "matplotlib",
        "nats",
        "numpy",
        "opentelemetry",
        "pyarrow",
    ),
    *("pydantic", "ray", "safetensors", "scipy", "sklearn", "structlog", "torch"),
}
MODULES = {
    "fedbus",
    "fedbus.app",
    "fedbus.app.failures",
    "fedbus.app.terminal",
    "fedbus.app.terminal.plain",
    "fedbus.common",
    "fedbus.common.ast_lock",
} | {
    "fedbus.app.cli",
    *(f"fedbus.app.cli.{name}" for name in ("command_table", "lazy", "main")),
}
RUN_AND_LIST_MODULES = """
import json, sys
from fedbus.app.cli.main import main
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def lazy_commands(
    group: click.Group, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], LazyCommand]]:
    """All commands under *group*, each with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from lazy_commands(command, (*words, name))
        else:
            assert isinstance(command, LazyCommand)
            yield (*words, name), command


def groups(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from groups(command, (*words, name))


ROOT = typer.main.get_group(app)
COMMANDS = dict(lazy_commands(ROOT))
each_command = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


@each_command
def test_each_command_and_parameter_has_help(words: tuple[str, ...]) -> None:
    command = COMMANDS[words].load()
    assert command.name == words[-1]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name


@each_command
def test_the_table_repeats_the_first_line_of_the_docstring(words: tuple[str, ...]) -> None:
    help_text = COMMANDS[words].load().help
    assert help_text is not None
    assert COMMANDS[words].help == help_text.partition("\n")[0]


@pytest.mark.parametrize("words", [*groups(ROOT)], ids=" ".join)
def test_help_of_a_group_imports_no_command(words: tuple[str, ...], tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_MODULES, *words, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    modules = set(json.loads(process.stderr))
    assert {name.partition(".")[0] for name in modules} & LIBRARIES == set()
    assert {name for name in modules if name.partition(".")[0] == "fedbus"} == MODULES


@pytest.mark.parametrize(
    ("typed", "completions"), [("fedbus mo", {"model"}), ("fedbus model r", {"rollback"})]
)
def test_completion_imports_no_command(typed: str, completions: set[str], tmp_path: Path) -> None:
    environment = {
        "_FEDBUS_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
    }
    process = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = 'fedbus'{RUN_AND_LIST_MODULES}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert set(process.stdout.split()) == completions
    assert {
        name for name in json.loads(process.stderr) if name.startswith("fedbus.app.cli.commands")
    } == set()


def test_events_decode_imports_no_client_and_no_terminal_library(tmp_path: Path) -> None:
    """`nats sub --translate` starts it for every message."""
    process = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_MODULES, "events", "decode"],
        input=b"\xc0",
        capture_output=True,
        check=True,
        cwd=tmp_path,
    )
    assert process.stdout == b"null\n"
    assert {name.partition(".")[0] for name in json.loads(process.stderr)} & {*LIBRARIES, "rich"} <= {
        "pydantic"
    }


async def test_completion_offers_the_options_of_a_command(tmp_path: Path) -> None:
    environment = {
        "_FEDBUS_COMPLETE": "complete_bash",
        "COMP_WORDS": "fedbus model ls --s",
        "COMP_CWORD": "3",
    }
    assert (await FedbusCli(tmp_path, **environment)()).out.split() == ["--store"]


async def test_a_misspelt_command_gets_one_suggestion(tmp_path: Path) -> None:
    assert (await FedbusCli(tmp_path)("rnu")).err.count("Did you mean 'run'?") == 1


async def test_a_described_default_is_shown(tmp_path: Path) -> None:
    output = (await FedbusCli(tmp_path)("trace", "--help")).out
    assert "the newest stored one" in output
    assert "the width of the terminal" in output


async def test_the_help_of_an_argument_is_shown(tmp_path: Path) -> None:
    assert "The run's id, from `fedbus run ls`." in (await FedbusCli(tmp_path)("run", "show", "--help")).out
