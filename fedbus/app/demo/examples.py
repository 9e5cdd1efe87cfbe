"""Where the tasks are that come with fedbus."""

from pathlib import Path
from typing import Final

import fedbus
from fedbus.app.failures import Exit, Failure

IN_THE_TREE: Final = Path(fedbus.__file__).parents[1] / "examples"


def mnist() -> Path:
    """The task of the demonstration; raises Failure where fedbus was installed without its examples."""
    path = IN_THE_TREE / "mnist"
    if not path.is_dir():
        raise Failure(
            "the example tasks are not here: clone fedbus's repository, or say --task DIRECTORY",
            Exit.NOT_FOUND,
        )
    return path
