"""The command line, or Python code, in a process: arguments, output and exit code.

The imports of a command take a second of CPU time, and the tests run hundreds of commands. So each process is forked
from one that has imported all modules, by the fork server of multiprocessing. Tests of imports, start and signals start
real processes: tests/app/cli/test_main.py, tests/app/local/test_stopping.py and tests/faults.
"""

import asyncio
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
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
    "fedbus.app.telemetry.collector",
    "fedbus.stores.models.directory",
    "fedbus.stores.models.s3",
    "aiobotocore.session",
    "numpy.random",
    "rich.markdown",
    "support.forked_cli",
    "support.cli_preload",
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
    """Runs `fedbus …` in a process, with its own environment."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.environment = clean_environment() | {"FEDBUS_HOME": str(home), "COLUMNS": "200"} | environment

    async def __call__(self, *words: str, stdin: bytes = b"", **environment: str) -> CliResult:
        variables = self.environment | environment
        with _start(forked_cli.run_cli, words, variables, Path(), stdin) as (process, files):
            await asyncio.to_thread(process.join)
            return _result(process, files)


def run_fedbus(
    *words: str, environment: Mapping[str, str], directory: Path = Path(), stdin: bytes = b""
) -> CliResult:
    """Run `fedbus` with the arguments *words* in *directory*, and wait for its end."""
    with _start(forked_cli.run_cli, words, environment, directory, stdin) as (process, files):
        process.join()
        return _result(process, files)


def run_python(code: str, *arguments: str, environment: Mapping[str, str]) -> CliResult:
    """Run *code* with *arguments*, wait for its end, and check that it succeeded."""
    with _start(forked_cli.run_code, (code, *arguments), environment, Path(), b"") as (process, files):
        process.join()
        return _successful(process, files)


async def run_python_async(
    code: str, *arguments: str, environment: Mapping[str, str], within_s: float
) -> CliResult:
    """Run *code* with *arguments*, while the event loop runs, and check that it succeeded within a limit."""
    with _start(forked_cli.run_code, (code, *arguments), environment, Path(), b"") as (process, files):
        await asyncio.to_thread(process.join, within_s)
        return _successful(process, files)


def clean_environment(*others: str) -> dict[str, str]:
    """The environment without the variables of fedbus and OpenTelemetry, and without those that start with *others*."""
    without = ("FEDBUS", "OTEL", *others)
    return {name: value for name, value in os.environ.items() if not name.startswith(without)}


SERVER_ENVIRONMENT: Final = clean_environment("PYTHONPATH") | {
    "PYTHONPATH": os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
}
"""The environment of the fork server. It has no variables of a test, by which `processes_of` would find it."""


@contextmanager
def _start(
    target: Callable[[list[str], Mapping[str, str], Path, Path], None],
    words: tuple[str, ...],
    environment: Mapping[str, str],
    directory: Path,
    stdin: bytes,
) -> Iterator[tuple[ForkServerProcess, Path]]:
    """Start the process, with its standard files in a directory; kill it if it still runs when the block ends."""
    with TemporaryDirectory(prefix="cli-") as directory_name:
        files = Path(directory_name)
        (files / "in").write_bytes(stdin)
        (files / "out").touch()
        (files / "err").touch()
        with mock.patch.dict(os.environ, SERVER_ENVIRONMENT, clear=True):
            forkserver.ensure_running()
        arguments = (list(words), dict(environment), directory.absolute(), files)
        process = _server.Process(target=target, args=arguments)
        process.start()
        try:
            yield process, files
        finally:
            process.kill()
            process.join()
            process.close()


def _successful(process: ForkServerProcess, files: Path) -> CliResult:
    assert process.exitcode is not None, "the process has not ended in time"
    result = _result(process, files)
    assert result.code == 0, result.err
    return result


def _result(process: ForkServerProcess, files: Path) -> CliResult:
    assert process.exitcode is not None
    return CliResult(process.exitcode, (files / "out").read_text(), (files / "err").read_text())
