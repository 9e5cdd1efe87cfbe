"""A whole federation in processes of its own, to kill parts of."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedbus.app.local.stack import LocalStack, run_stack
from fedbus.app.settings import Settings
from fedbus.app.views.fleet import Fleet
from fedbus.bus.bus import Bus, Identity, StoredMessage
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.run import RunData, StartRun
from fedbus.contracts.transition import Transition
from support import ConditionNotMet, eventually
from support.federation import tiny_task
from support.processes import command_of, processes_of

TASK = "tiny"


@dataclass
class ProcessFederation:
    """What a test may look at, and break."""

    stack: LocalStack
    fleet: Fleet
    bus: Bus

    async def start_run(self, **wishes: object) -> str:
        await eventually(self._can_start, within_s=60)
        started = await self.bus.request(StartRun.model_validate({"task": TASK, **wishes}), timeout_s=60)
        return str(started.run)

    def _can_start(self) -> bool:
        return self.fleet.server == "waiting" and all(
            self.fleet.clients[name].is_settled if name in self.fleet.clients else False
            for name in self.stack.clients
        )

    async def wait_until(self, condition: Callable[[], bool], *, within_s: float = 90) -> None:
        try:
            await eventually(condition, within_s=within_s)
        except ConditionNotMet:
            steps = "\n".join(str(step) for step in self.fleet.steps)
            raise ConditionNotMet(within_s, f"the transitions were:\n{steps}") from None

    def run_facts(self, run: str) -> RunData:
        return self.fleet.runs[run]

    def is_in_round(self, run: str, number: int) -> bool:
        """Whether the round before *number* is over, and this one not."""
        return run in self.fleet.runs and [one.round for one in self.run_facts(run).rounds][-1:] == [
            number - 1
        ]

    def has_ended(self, run: str) -> bool:
        return any(facts.run == run for facts in self.fleet.ended)

    def find_process(self, *words: str) -> psutil.Process:
        """The oldest process of this site whose command line has all these *words*."""
        found = [one for one in processes_of(self.stack.home) if set(words) <= set(command_of(one))]
        return min(found, key=lambda one: one.create_time())


MANUAL_RUN_OPTIONS = ("--rounds", "4", "--quorum", "3", "--run-config", "pause-s=1.0")
"""Runs of four rounds, each a second long, when somebody asks."""


@asynccontextmanager
async def run_process_federation(
    directory: Path, options: Sequence[str] = MANUAL_RUN_OPTIONS
) -> AsyncIterator[ProcessFederation]:
    """Three clients, and a server with these *options*; nobody may be left behind."""
    task = tiny_task(directory)
    settings = Settings.from_environment({"FEDBUS_HOME": str(directory / "home")})
    async with (
        run_stack(settings, [task.path], clients=3, server_options=options) as running,
        Bus.connect(running.nats.url, Identity(settings.fed, "test")) as bus,
    ):
        await bus.create_streams()
        site = ProcessFederation(running, Fleet(), bus)
        async with bus.watch(
            lifecycle_stream(bus.fed), [subjects.wildcard_for(bus.fed, Transition)], whole=True
        ) as moves:
            watching = asyncio.ensure_future(_apply_transitions(moves, site.fleet))
            try:
                yield site
            finally:
                watching.cancel()
                await asyncio.wait([watching])
    assert processes_of(settings.home) == [], "somebody was left behind"


async def _apply_transitions(moves: AsyncIterator[StoredMessage], fleet: Fleet) -> None:
    async for seen in moves:
        if isinstance(seen.message, Transition):
            fleet.see(seen.message, seen.envelope.time)
