"""The store in memory of a simulated fleet as a backend of the model repository. Its URLs are ``memory://<name>``."""

from datetime import datetime
from pathlib import Path
from typing import ClassVar, Self

from fedbus.contracts.identifiers import TaskId
from fedbus.simulation.fleet.model_store import FleetObjectStore
from fedbus.stores.models.object_store import MARKER


class MemoryObjectStore(FleetObjectStore):
    """The objects of *task* at *root*, which all stores with the same URL and task share."""

    folders: ClassVar[dict[tuple[str, str], dict[str, tuple[bytes, datetime]]]] = {}
    copies: ClassVar[Path] = Path()
    """Where `artifact_file` writes; a test sets it."""

    def __init__(self, root: str, task: str) -> None:
        super().__init__(self.copies, url=root, objects=self.folders.setdefault((root, task), {}))
        self._task = task

    @classmethod
    def open(cls, url: str, task: TaskId, *, patience_s: float) -> Self:  # noqa: ARG003 (memory answers at once)
        return cls(url, task)

    @classmethod
    async def list_tasks(cls, url: str, *, patience_s: float) -> list[str]:  # noqa: ARG003
        return sorted(
            task for (root, task), objects in cls.folders.items() if root == url and MARKER in objects
        )

    def place(self, key: str = "") -> str:
        return f"{self.url}/{self._task}/{key}"
