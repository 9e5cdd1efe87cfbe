"""Processes in which Flower and torch cannot be imported, as on a device that has not installed them."""

import os
import sys
from pathlib import Path

BLOCKED = ("flwr", "torch", "sklearn")

_SITE_CUSTOMIZE = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def environment_without_libraries(directory: Path) -> dict[str, str]:
    """The environment of such processes. Their children inherit it."""
    blocker = directory / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(_SITE_CUSTOMIZE)
    return {
        **os.environ,
        "PYTHONPATH": str(blocker),
        "FEDBUS_HOME": str(directory / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
