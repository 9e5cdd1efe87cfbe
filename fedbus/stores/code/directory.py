"""The code of a task in a plain directory: one version, the content at the first call."""

import asyncio
import threading
from collections.abc import Collection
from pathlib import Path

from fedbus.contracts.task.app import FindAppReader
from fedbus.contracts.task.task import Task
from fedbus.stores.code.interface import CodeRejected, Commit
from fedbus.stores.tasks.task_directory import read_task

_HOW_TO_FOLLOW = "to follow new versions, give git+https://host/repository@branch as the task"
_MIN_PREFIX = 4


class DirectoryCodeRepository:
    """The task in *directory*. The first method that reads it raises TaskInvalid if it is invalid."""

    can_update = False
    requires_signatures = False
    signers_fingerprint: object = None

    def __init__(self, directory: Path, libraries: FindAppReader) -> None:
        self._libraries = libraries
        self.source = str(directory)
        self._directory = directory
        self._task: Task | None = None
        self._read_lock = threading.Lock()  # not asyncio.Lock: several event loops may use this object

    async def fetch_latest(self) -> str:
        return (await self._read()).code_version

    async def resolve(self, name: str) -> str:
        version = await self.fetch_latest()
        digest = version.removeprefix("sha256:")
        if len(name) >= _MIN_PREFIX and (version.startswith(name) or digest.startswith(name)):
            return version
        raise self._reject_other_version(name)

    async def list_commits(self, limit: int = 20) -> list[Commit]:  # noqa: ARG002  # a directory has no history
        return []

    async def load_task(self, version: str) -> Task:
        task = await self._read()
        if task.code_version != version:
            raise self._reject_other_version(version)
        return task

    async def verify(self, version: str) -> None:
        await self.load_task(version)

    async def prune(self, keep: Collection[str]) -> None:
        """Do nothing: fedbus does not own the directory."""

    async def _read(self) -> Task:
        if self._task is not None:
            return self._task
        return await asyncio.to_thread(self._read_once)

    def _read_once(self) -> Task:
        with self._read_lock:
            if self._task is None:
                self._task = read_task(self._directory, self._libraries)
            return self._task

    def _reject_other_version(self, version: str) -> CodeRejected:
        return CodeRejected(version, f"{self.source} is a directory with one version; {_HOW_TO_FOLLOW}")
