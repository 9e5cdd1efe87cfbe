"""The command line as a person or a script uses it: a process of its own, its words and its exit code.

What a command imports takes it a second of a processor, and the tests run hundreds. So each of their processes is
forked from one that has imported it all, by multiprocessing's fork server. What a start from nothing is like, its
imports and its signals, is seen where that is the question: tests/app/cli/test_main.py, test_stopping.py, tests/faults.
"""

import asyncio
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from unittest import mock

from fedbus.app.cli.command_table import COMMANDS
from fedbus.app.cli.lazy import CommandEntry, CommandTable, GroupEntry
from support import forked_cli


def command_modules(table: CommandTable) -> set[str]:
    """Return the modules that the commands of *table* are in."""
    modules: set[str] = set()
    for entry in table.values():
        match entry:
            case CommandEntry(target):
                modules.add(target.partition(":")[0])
            case GroupEntry(commands=commands):
                modules |= command_modules(commands)
    return modules


PRELOADED: Final = [
    "fedbus.app.cli.main",
    *sorted(command_modules(COMMANDS)),
    "fedbus.stores.models.directory",
    "fedbus.stores.models.s3",
    "aiobotocore.session",
    "numpy.random",
    "rich.markdown",
    "support.forked_cli",
]
_server: Final = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["__main__", *PRELOADED])

TESTS: Final = str(Path(__file__).parents[1])


@dataclass
class CliResult:
    code: int
    out: str
    err: str

    @property
    def facts(self) -> Any:
        return json.loads(self.out)


class FedbusCli:
    """`fedbus …` in a process of its own."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.environment = clean_environment() | {"FEDBUS_HOME": str(home), "COLUMNS": "200"} | environment

    async def __call__(self, *words: str, stdin: bytes = b"", **environment: str) -> CliResult:
        with _start(words, self.environment | environment, Path(), stdin) as (process, files):
            await asyncio.to_thread(process.join)
            return _result(process, files)


def run_fedbus(
    *words: str, environment: Mapping[str, str], directory: Path = Path(), stdin: bytes = b""
) -> CliResult:
    """The same for who waits: `fedbus` *words* in *directory*."""
    with _start(words, environment, directory, stdin) as (process, files):
        process.join()
        return _result(process, files)


def clean_environment(*others: str) -> dict[str, str]:
    """Our environment without what is set for fedbus and OpenTelemetry in it, and whatever begins like *others*."""
    without = ("FEDBUS", "OTEL", *others)
    return {name: value for name, value in os.environ.items() if not name.startswith(without)}


SERVER_ENVIRONMENT: Final = clean_environment("PYTHONPATH") | {
    "PYTHONPATH": os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
}
"""Of the fork server: nothing of a test's, whose process it would be taken for."""


@contextmanager
def _start(
    words: tuple[str, ...], environment: Mapping[str, str], directory: Path, stdin: bytes
) -> Iterator[tuple[ForkServerProcess, Path]]:
    """The process, and where its words go; killed where nobody waits for its end."""
    with TemporaryDirectory(prefix="said-") as where:
        files = Path(where)
        (files / "in").write_bytes(stdin)
        (files / "out").touch()
        (files / "err").touch()
        with mock.patch.dict(os.environ, SERVER_ENVIRONMENT, clear=True):
            forkserver.ensure_running()
        arguments = (list(words), dict(environment), directory.absolute(), files)
        process = _server.Process(target=forked_cli.run_cli, args=arguments)
        process.start()
        try:
            yield process, files
        finally:
            process.kill()
            process.join()
            process.close()


def _result(process: ForkServerProcess, files: Path) -> CliResult:
    assert process.exitcode is not None
    return CliResult(process.exitcode, (files / "out").read_text(), (files / "err").read_text())
