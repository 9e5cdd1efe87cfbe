"""Where the ServerApp of a run is at work: in a child process beside the wrapper, or in a Kubernetes Job.

The wrapper orders, watches and stops; a launcher knows how that is done in one place. It answers in
words how the work was lost, and with nothing where it ended as it should: then it has said so itself,
on the bus.
"""

import asyncio
from pathlib import Path
from typing import Protocol

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.child_process import ChildNotStarted, ChildProcess
from fedbus.agents.common.process_orders import ServerProcessConfig, child_command


class Launcher(Protocol):
    """Somewhere a ServerApp can be run."""

    @property
    def shares_files(self) -> bool:
        """Whether what lies on the wrapper's disk lies there as well."""

    async def run(self, order: ServerProcessConfig, stop: asyncio.Event) -> str:
        """Run *order* until it ends or *stop* is set, and leave nothing of it behind. How it was lost, or nothing."""

    async def sweep(self) -> None:
        """End what an earlier wrapper of this task started and could not end."""


class ChildLauncher:
    """In a process of its own on this machine, which ends with us whatever happens. Its log goes to *logs*."""

    shares_files = True

    def __init__(self, logs: Path) -> None:
        self._logs = logs

    async def run(self, order: ServerProcessConfig, stop: asyncio.Event) -> str:
        child = ChildProcess(
            f"Flower server of {order.run}",
            *child_command("server"),
            environment=order.environment(),
            output=self._logs / f"{order.run}.log",
        )
        try:
            async with child:
                await wait_for_first(child.ended(), stop.wait())
                code = child.returncode
        except ChildNotStarted as error:
            return str(error)
        if code in (None, 0) or stop.is_set():
            return ""
        return f"the Flower server {child.describe_exit()}"

    async def sweep(self) -> None:
        """There is nothing: a child ends with its parent."""
