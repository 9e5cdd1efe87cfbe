"""The commits of `fedbus demo --commit`: the task's code changes between two runs, and the federation follows.

The demo copies the task into a Git repository of its own and signs each commit. A commit halves the learning rate, if
the app has one, and counts the revision in a line of the package.
"""

import re
from pathlib import Path

from fedbus.contracts.task.task import Task
from fedbus.stores.code.demo_repository import DemoRepository

_LEARNING_RATE = re.compile(r"^(?P<name>lr|learning-rate)(?P<is>\s*=\s*)(?P<value>[0-9.eE+-]+)", re.MULTILINE)


class DemoCommits:
    """The repository of a demo."""

    def __init__(self, home: Path, task: Task) -> None:
        self._repository = DemoRepository.create(home / "task", Path(task.path))
        self._package = next(reversed(task.app.values())).partition(":")[0].partition(".")[0]
        self.shas: list[str] = []
        """The full SHAs of the commits after the initial one."""

    @property
    def source(self) -> str:
        return self._repository.source

    @property
    def allowed_signers(self) -> Path | None:
        return self._repository.allowed_signers

    def commit_change(self) -> str:
        """Commit a change of the task's code and return the full SHA. Blocking."""
        revision = len(self.shas) + 2
        files = {"pyproject.toml": self._halve_learning_rate(), **self._count_revision(revision)}
        self.shas.append(self._repository.commit(f"Revision {revision}: smaller steps", files))
        return self.shas[-1]

    def _halve_learning_rate(self) -> str:
        text = (self._repository.directory / "pyproject.toml").read_text(encoding="utf-8")
        return _LEARNING_RATE.sub(
            lambda rate: f"{rate['name']}{rate['is']}{float(rate['value']) / 2:g}", text, count=1
        )

    def _count_revision(self, revision: int) -> dict[str, str]:
        """Return the package's file with the number of the revision; the package may also be one module."""
        name = f"{self._package}/__init__.py"
        if not (self._repository.directory / self._package).is_dir():
            name = f"{self._package}.py"
        text = (self._repository.directory / name).read_text(encoding="utf-8")
        code = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("REVISION = "))
        return {name: f"{code.rstrip()}\n\nREVISION = {revision}\n".lstrip()}
