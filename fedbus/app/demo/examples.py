"""The example tasks of fedbus."""

from pathlib import Path
from typing import Final

import fedbus
from fedbus.app.failures import CliError, ExitCode

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
