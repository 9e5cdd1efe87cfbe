"""The task's code on one device: which version it is on, which it should be on, and how it gets one ready.

Nothing here changes what the device does: a version is fetched beside the one in use, verified and
checked, and only then `switch` makes it the device's own, at a moment that the client manager chooses.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import structlog

from fedbus.agents.common.asyncio_tools import backoff_s
from fedbus.agents.common.code_check import CheckFailed
from fedbus.contracts.code import CodePlan
from fedbus.contracts.task.task import Task
from fedbus.domain.code_rollout import target_code_version
from fedbus.stores.code.open import CodeRejected, CodeRepository, CodeUnavailable
from fedbus.stores.errors import StoreError

VERSION_FILE: Final = "code-version"
"""The file that remembers which version the device is on, for its next start."""

log = structlog.get_logger("fedbus.device_code")
Check = Callable[[Task], Awaitable[object]]
"""Runs the task's code once, in a process of its own; raises CheckFailed with the reason."""


class CodeNotReady(Exception):
    """This version is not to be had on this device; the text says why."""


class DeviceCode:
    """What the device *client* runs of a task. *first* is what it was started with."""

    def __init__(
        self,
        code: CodeRepository,
        first: Task,
        *,
        client: str,
        labels: Mapping[str, str],
        check: Check | None,
        kept: Path,
    ) -> None:
        self._code = code
        self._client = client
        self._labels = labels
        self._check = check
        self._version_file = kept
        self._checked = {first.code_version}
        self.task = first
        self.plan: CodePlan | None = None
        """What the server last said of code."""
        self.refused: dict[str, str] = {}
        """Versions that are not tried again in this rollout, and why."""

    @property
    def version(self) -> str:
        """What the device is on."""
        return self.task.code_version

    def follow(self, plan: CodePlan | None) -> None:
        """Go by *plan* from now on. In another rollout what was refused is tried again: its cause may be gone."""
        before, self.plan = self.attempt, plan
        if before is not None and before != self.attempt:
            self.refused.clear()

    @property
    def attempt(self) -> int | None:
        return None if self.plan is None else self.plan.attempt

    @property
    def wanted(self) -> str | None:
        """What it should be on and is not; None where all is well, or nothing can be done about it."""
        if self.plan is None:
            return None
        version = target_code_version(self.plan, self._client, self._labels)
        return version if version != self.version and version not in self.refused else None

    async def prepare(self, version: str) -> Task:
        """The task at *version*: fetched, verified, checked. Waits for a repository that is away; raises NotReady."""
        attempt = 0
        while True:
            try:
                task = await self._code.task_at(version)
                await self._check_once(task)
            except CodeUnavailable as error:
                if attempt == 0:
                    log.warning("the code repository is away", reason=str(error))
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1
            except CodeRejected as error:
                raise CodeNotReady(error.reason) from error
            except (CheckFailed, StoreError) as error:
                raise CodeNotReady(str(error)) from error
            else:
                return task

    async def _check_once(self, task: Task) -> None:
        """Once for each version: a device goes back and forth between them at once."""
        if task.id != self.task.id:
            raise CodeNotReady(f"it is task {task.id!r}, and this device runs {self.task.id!r}")
        if self._check is not None and task.code_version not in self._checked:
            await self._check(task)
            self._checked.add(task.code_version)

    async def switch_to(self, task: Task) -> None:
        """From here on the device is on *task*, also when it is started anew."""
        self.task = task
        await asyncio.to_thread(_write_atomically, self._version_file, task.code_version)


def read_last_version(kept: Path) -> str:
    """The version that the device was on when it ended; empty where that is not known."""
    try:
        return kept.read_text().strip()
    except OSError:
        return ""


def _write_atomically(path: Path, text: str) -> None:
    """Write *text* to *path*, which never holds a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(f"{text}\n")
    part.replace(path)
