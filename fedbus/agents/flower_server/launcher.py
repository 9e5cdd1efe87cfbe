"""Launchers, which run the server session of a run in a child process or in a Kubernetes Job.

The Flower server agent starts and stops a server session through a launcher. The launcher returns the reason if the
session was lost, and "" if it ended normally: then it has published its end itself.
"""

import asyncio
from pathlib import Path
from typing import Protocol

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.child_process import ChildNotStarted, ChildProcess
from fedbus.agents.common.process_orders import ServerProcessConfig, child_command


class Launcher(Protocol):
    """Runs server sessions in one kind of place."""

    @property
    def has_shared_files(self) -> bool:
        """Whether the session has access to the files of the agent's machine."""

    async def run(self, config: ServerProcessConfig, stop: asyncio.Event) -> str:
        """Run a server session until it ends or *stop* is set, and clean up. Returns how it was lost, or ""."""

    async def remove_orphans(self) -> None:
        """End server sessions of this task that an earlier agent has left behind."""


class ChildLauncher:
    """Runs server sessions in child processes, which end with this process. They write their logs to *logs*."""

    has_shared_files = True

    def __init__(self, logs: Path) -> None:
        self._logs = logs

    async def run(self, config: ServerProcessConfig, stop: asyncio.Event) -> str:
        child = ChildProcess(
            f"Flower server of {config.run}",
            *child_command("server"),
            environment=config.environment(),
            output=self._logs / f"{config.run}.log",
        )
        try:
            async with child:
                await wait_for_first(child.wait(), stop.wait())
                code = child.returncode
        except ChildNotStarted as error:
            return str(error)
        if code in (None, 0) or stop.is_set():
            return ""
        return f"the Flower server {child.describe_exit()}"

    async def remove_orphans(self) -> None:
        """Do nothing: a child process ends with its parent."""
