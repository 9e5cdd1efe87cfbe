"""Trainers: what trains one run for one client, in a process of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.child_process import ChildNotStarted, ChildProcess
from fedbus.agents.common.process_orders import LOAD_FAILED_EXIT_CODE, TrainerProcessConfig, child_command
from fedbus.contracts.client import ClientStart
from fedbus.stores.errors import StoreError

Heartbeats: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
"""Publishes heartbeats until it is cancelled."""


@dataclass(frozen=True)
class TrainerEnd:
    """How a trainer ended by itself."""

    reason: str
    load_failed: bool = False
    """True if the trainer could not load the task's code."""


class TrainerLauncher(Protocol):
    """Runs trainers, one for each run."""

    async def run(self, start: ClientStart, stop: asyncio.Event, heartbeats: Heartbeats) -> TrainerEnd:
        """Train until *stop* is set, or until the trainer ends. *heartbeats* runs for as long as the trainer does."""


class ChildTrainer:
    """Runs trainers in child processes, which write their logs to *logs*.

    *build_config* builds the configuration of a process with the code version of the run. It raises StoreError if that
    version is not available.
    """

    def __init__(
        self, build_config: Callable[[ClientStart], Awaitable[TrainerProcessConfig]], *, logs: Path
    ) -> None:
        self._build_config = build_config
        self._logs = logs

    async def run(self, start: ClientStart, stop: asyncio.Event, heartbeats: Heartbeats) -> TrainerEnd:
        try:
            child = ChildProcess(
                f"trainer of {start.run}",
                *child_command("trainer"),
                environment=(await self._build_config(start)).environment(),
                output=self._logs / f"{start.run}.log",
            )
            async with child:
                await wait_for_first(child.wait(), stop.wait(), heartbeats())
        except (ChildNotStarted, StoreError) as error:
            return TrainerEnd(str(error))
        if child.returncode == LOAD_FAILED_EXIT_CODE:
            return TrainerEnd(child.answer, load_failed=True)
        return TrainerEnd(f"the trainer {child.describe_exit()}")
