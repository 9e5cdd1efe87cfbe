"""Where the tasks are that come with fedbus."""

from pathlib import Path
from typing import Final

import fedbus
from fedbus.app.failures import CliError, ExitCode

EXAMPLES_DIRECTORY: Final = Path(fedbus.__file__).parents[1] / "examples"


def mnist_path() -> Path:
    """The task of the demonstration; raises Failure where fedbus was installed without its examples."""
    path = EXAMPLES_DIRECTORY / "mnist"
    if not path.is_dir():
        raise CliError(
            "the example tasks are not here: clone fedbus's repository, or say --task DIRECTORY",
            ExitCode.NOT_FOUND,
        )
    return path
