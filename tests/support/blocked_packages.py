"""Processes in which packages cannot be imported, as on a machine that has not installed them."""

import os
import sys
from pathlib import Path

_SITE_CUSTOMIZE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def environment_without(directory: Path, *packages: str) -> dict[str, str]:
    """The environment of processes that cannot import *packages*. Their children inherit it."""
    blocker = directory / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(_SITE_CUSTOMIZE.format(packages=packages))
    return {
        **os.environ,
        "PYTHONPATH": str(blocker),
        "FEDBUS_HOME": str(directory / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
