"""The main functions of processes that were forked for a command or for Python code."""

import atexit
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path


def run_cli(words: list[str], environment: Mapping[str, str], directory: Path, files: Path) -> None:
    """Run `fedbus` with the arguments *words* in *directory*; *files* has its standard input, output and error."""
    _prepare(words, environment, directory, files)
    from fedbus.app.cli.main import main  # noqa: PLC0415  # imported before the fork

    try:
        main()
    finally:
        atexit._run_exitfuncs()


def run_code(words: list[str], environment: Mapping[str, str], directory: Path, files: Path) -> None:
    """Run the Python code `words[0]` as `python -c` does, with the arguments *words*."""
    _prepare(words[1:], environment, directory, files)
    try:
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _prepare(words: list[str], environment: Mapping[str, str], directory: Path, files: Path) -> None:
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        os.dup2(os.open(files / name, flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # multiprocessing has closed it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv[:] = ["fedbus", *words]
