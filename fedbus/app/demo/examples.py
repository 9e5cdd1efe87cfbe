"""The example tasks of fedbus."""

import re
import shutil
from pathlib import Path
from typing import Final

import fedbus
from fedbus.app.failures import CliError, ExitCode
from fedbus.contracts.task.task import DEFAULT_LIBRARY

EXAMPLES_DIRECTORY: Final = Path(fedbus.__file__).parents[1] / "examples"


def mnist_path() -> Path:
    """Return the directory of the demo's task.

    Raises:
        CliError: fedbus is installed without its examples.

    """
    path = EXAMPLES_DIRECTORY / "mnist"
    if not path.is_dir():
        raise CliError(
            "the example tasks are not installed: clone the repository of fedbus, or use --task DIRECTORY",
            ExitCode.NOT_FOUND,
        )
    return path


def mnist_path_for(library: str, copies: Path) -> Path:
    """Return the directory of the demo's task for the training library *library*.

    It is the example of that library. A library without one gets a copy of the MNIST example in *copies* that names it,
    with the same app.

    Raises:
        CliError: fedbus is installed without its examples.

    """
    default = mnist_path()
    if library == DEFAULT_LIBRARY:
        return default
    own = EXAMPLES_DIRECTORY / f"{default.name}-{library}"
    if own.is_dir():
        return own
    copy = copies / default.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(default, copy, ignore=shutil.ignore_patterns("__pycache__"))
    pyproject = copy / "pyproject.toml"
    text = pyproject.read_text(encoding="utf-8")
    pyproject.write_text(
        re.sub(r"(?m)^\[tool\.fedbus\]$", f'[tool.fedbus]\nlibrary = "{library}"', text), encoding="utf-8"
    )
    return copy
