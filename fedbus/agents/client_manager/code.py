"""The task's code on one device: fetches, verifies and checks a version, and remembers which one the device has.

A version is prepared while the current one stays in use; `DeviceCode.switch_to` makes it the device's version, at a
moment that the client manager chooses.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from fedbus.agents.common.code_check import CheckFailed
from fedbus.common.filesystem import atomic_write
from fedbus.common.retry import retry
from fedbus.contracts.task.task import Task
from fedbus.stores.code.open import CodeRejected, CodeRepository, CodeUnavailable
from fedbus.stores.errors import StoreError

VERSION_FILE: Final = "code-version"
"""The file with the version of the device, for its next start."""

log = structlog.get_logger("fedbus.device_code")
Check = Callable[[Task], Awaitable[object]]
"""Runs the task's code once, in a process of its own; raises CheckFailed with the reason."""


class CodeNotReady(Exception):
    """This device cannot use a version."""


class DeviceCode:
    """The code of one task on one device.

    Args:
        repository: Where versions come from.
        task: The version that the device starts with.
        check: Runs a version once; None: versions are used without a check.
        version_file: The file with the version of the device.

    """

    def __init__(
        self, repository: CodeRepository, task: Task, *, check: Check | None, version_file: Path
    ) -> None:
        self._repository = repository
        self._task = task.id
        self._check = check
        self._version_file = version_file
        self._checked = {task.code_version}

    async def prepare(self, version: str) -> Task:
        """Fetch, verify and check the task at *version*. Retries while the repository is unavailable.

        Raises:
            CodeNotReady: The version is rejected, or has failed its check.

        """

        def report(error: Exception, attempt: int) -> None:
            if attempt == 0:
                log.warning("Code repository unavailable; retrying", reason=str(error))

        try:
            return await retry(partial(self._load_and_check, version), on=CodeUnavailable, on_failure=report)
        except CodeRejected as error:
            raise CodeNotReady(error.reason) from error
        except (CheckFailed, StoreError) as error:
            raise CodeNotReady(str(error)) from error

    async def _load_and_check(self, version: str) -> Task:
        task = await self._repository.load_task(version)
        await self._check_once(task)
        return task

    async def _check_once(self, task: Task) -> None:
        """Check each version once, so that a device changes back to an earlier one at once."""
        if task.id != self._task:
            raise CodeNotReady(f"the code is of task {task.id!r}; this device runs {self._task!r}")
        if self._check is not None and task.code_version not in self._checked:
            await self._check(task)
            self._checked.add(task.code_version)

    async def switch_to(self, task: Task) -> None:
        """Remember that the device has the version of *task*."""
        await asyncio.to_thread(self._record_version, task.code_version)

    def _record_version(self, version: str) -> None:
        self._version_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self._version_file, f"{version}\n")


def read_last_version(version_file: Path) -> str:
    """Read the version that the device had when it ended; empty if it is not known."""
    try:
        return version_file.read_text().strip()
    except OSError:
        return ""
