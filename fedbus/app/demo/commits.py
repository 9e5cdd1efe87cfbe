"""What `fedbus demo --commit` commits: between two runs the task's code changes, and nobody's hand does the rest.

The task is copied into a Git repository of the demonstration's own, which the federation follows, and each
commit is signed. What changes is small and real: steps half as long where the app has a learning rate, and
a line in the package that says which revision it is.
"""

import re
from pathlib import Path

from fedbus.contracts.task.task import Task
from fedbus.stores.code.demo_repository import DemoRepository

_LEARNING_RATE = re.compile(r"^(?P<name>lr|learning-rate)(?P<is>\s*=\s*)(?P<value>[0-9.eE+-]+)", re.MULTILINE)


class DemoCommits:
    """The repository of a demonstration, and what was committed to it."""

    def __init__(self, home: Path, task: Task) -> None:
        self._repository = DemoRepository.create(home / "task", Path(task.path))
        self._package = task.clientapp.partition(":")[0].partition(".")[0]
        self.made: list[str] = []
        """The full SHAs of the commits since the first."""

    @property
    def source(self) -> str:
        return self._repository.source

    @property
    def allowed_signers(self) -> Path | None:
        return self._repository.allowed_signers

    def change_something(self) -> str:
        """Commit a change of the task's code; the full SHA. Blocking."""
        revision = len(self.made) + 2
        files = {"pyproject.toml": self._slower(), **self._revised(revision)}
        self.made.append(self._repository.commit(f"Revision {revision}: smaller steps", files))
        return self.made[-1]

    def _slower(self) -> str:
        text = (self._repository.directory / "pyproject.toml").read_text(encoding="utf-8")
        return _LEARNING_RATE.sub(
            lambda rate: f"{rate['name']}{rate['is']}{float(rate['value']) / 2:g}", text, count=1
        )

    def _revised(self, revision: int) -> dict[str, str]:
        """The package's own line about itself; the package may also be one module."""
        name = f"{self._package}/__init__.py"
        if not (self._repository.directory / self._package).is_dir():
            name = f"{self._package}.py"
        before = (self._repository.directory / name).read_text(encoding="utf-8")
        kept = "".join(
            line for line in before.splitlines(keepends=True) if not line.startswith("REVISION = ")
        )
        return {name: f"{kept.rstrip()}\n\nREVISION = {revision}\n".lstrip()}
