"""A federation in real processes, which a test may kill."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedbus.app.demo.live_view import format_transition
from fedbus.app.local.stack import LocalStack, run_stack
from fedbus.app.settings import Settings
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.run import RunData, StartRun
from fedbus.contracts.server import ServerState
from fedbus.contracts.transition import Transition
from fedbus.domain.federation_view import FederationView
from support import ConditionNotMet, eventually
from support.federation import tiny_task
from support.processes import command_of, processes_of

TASK = "tiny"
MAX_TRANSITIONS = 100_000


@dataclass
class ProcessFederation:
    """A running federation, and its state from the transitions."""

    stack: LocalStack
    view: FederationView
    bus: Bus

    async def start_run(self, **wishes: object) -> str:
        await eventually(self._can_start, within_s=60)
        started = await self.bus.request(StartRun.model_validate({"task": TASK, **wishes}), timeout_s=60)
        return str(started.run)

    def _can_start(self) -> bool:
        server = self.view.servers.get(TASK)
        clients = [self.view.clients.get((name, TASK)) for name in self.stack.clients]
        is_waiting = server is not None and server.state == ServerState.WAITING
        return is_waiting and all(client is not None and client.is_settled for client in clients)

    async def wait_until(self, condition: Callable[[], bool], *, within_s: float = 90) -> None:
        try:
            await eventually(condition, within_s=within_s)
        except ConditionNotMet:
            steps = "\n".join(format_transition(one) for one in self.view.history)
            raise ConditionNotMet(within_s, f"the transitions were:\n{steps}") from None

    def run_facts(self, run: str) -> RunData:
        return self.view.runs[run].data

    def is_in_round(self, run: str, number: int) -> bool:
        """Whether the round before *number* has finished, and *number* has not."""
        return run in self.view.runs and [one.round for one in self.run_facts(run).rounds][-1:] == [
            number - 1
        ]

    def has_ended(self, run: str) -> bool:
        return any(one.data.run == run for one in self.view.finished_runs)

    def find_process(self, *words: str) -> psutil.Process:
        """The oldest process of this federation whose command line has all these *words*."""
        found = [one for one in processes_of(self.stack.home) if set(words) <= set(command_of(one))]
        return min(found, key=lambda one: one.create_time())


MANUAL_RUN_OPTIONS = ("--rounds", "4", "--quorum", "3", "--run-config", "pause-s=1.0")
"""Runs of four rounds of one second each, started by the test only."""


@asynccontextmanager
async def run_process_federation(
    directory: Path,
    options: Sequence[str] = MANUAL_RUN_OPTIONS,
    *,
    clients: int = 3,
    client_options: Mapping[str, Sequence[str]] | None = None,
) -> AsyncIterator[ProcessFederation]:
    """Run *clients* and a server with these *options*, and check at the end that no process is left."""
    task = tiny_task(directory)
    settings = Settings.from_environment({"FEDBUS_HOME": str(directory / "home")})
    async with (
        run_stack(
            settings, [task.path], clients=clients, server_options=options, client_options=client_options
        ) as stack,
        Bus.connect(stack.nats.url, Identity(settings.fed, "test")) as bus,
    ):
        await bus.create_streams()
        federation = ProcessFederation(stack, FederationView(max_history=MAX_TRANSITIONS), bus)
        async with bus.read_stream(
            lifecycle_stream(bus.fed), [subjects.wildcard_for(bus.fed, Transition)], whole=True
        ) as transitions:
            watcher = asyncio.ensure_future(_apply_transitions(transitions, federation.view))
            try:
                yield federation
            finally:
                watcher.cancel()
                await asyncio.wait([watcher])
    assert processes_of(settings.home) == [], "processes are left"


async def _apply_transitions(transitions: AsyncIterator[StoredMessage], view: FederationView) -> None:
    async for stored in transitions:
        if isinstance(stored.message, Transition):
            view.apply(stored.message, at=stored.envelope.time, sequence=stored.sequence)
