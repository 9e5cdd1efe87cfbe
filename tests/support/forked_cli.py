"""What a process that was forked for a command does: nothing but be that command."""

import atexit
import os
import sys
from collections.abc import Mapping
from pathlib import Path


def run_cli(words: list[str], environment: Mapping[str, str], directory: Path, files: Path) -> None:
    """Be `fedbus` *words* in *directory*, with the three of *files* for what it reads and says."""
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
        os.dup2(os.open(files / name, flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # multiprocessing has closed it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv[:] = ["fedbus", *words]
    from fedbus.app.cli.main import main  # noqa: PLC0415  # it was imported before we were forked

    try:
        main()
    finally:
        atexit._run_exitfuncs()
