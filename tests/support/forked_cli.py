"""The main function of a process that was forked for a command."""

import atexit
import os
import sys
from collections.abc import Mapping
from pathlib import Path


def run_cli(words: list[str], environment: Mapping[str, str], directory: Path, files: Path) -> None:
    """Run `fedbus` with the arguments *words* in *directory*; *files* has its standard input, output and error."""
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        os.dup2(os.open(files / name, flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # multiprocessing has closed it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv[:] = ["fedbus", *words]
    from fedbus.app.cli.main import main  # noqa: PLC0415  # imported before the fork

    try:
        main()
    finally:
        atexit._run_exitfuncs()
