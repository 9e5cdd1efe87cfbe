"""A federation on a real nats-server, for tests that run agents and record all their messages.

    async with open_federation(nats.url, tmp_path) as fed:
        async with fed.run_agent(lambda stop: server_manager(fed.config, stop)):
            await fed.wait_for_state("server", "waiting")

When it ends, it checks the transitions of every entity against the lifecycle table. So each test also checks that
no agent published an illegal transition. The test takes the part of all agents that do not run: see `fed.bus`.
"""

import asyncio
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar

from fedbus.app.composition.agents import AgentConfig, ClientConfig
from fedbus.app.views.federation_status import apply_stored
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import requests_answered_by, stream_subjects
from fedbus.contracts.identifiers import FederationId, client_id
from fedbus.contracts.message import Body, Message, Refused, Request
from fedbus.contracts.run import RunData, RunOverrides
from fedbus.contracts.server import ServerData
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.contracts.task.task import ScheduleTable, Task
from fedbus.contracts.transition import LIFECYCLES, Transition
from fedbus.domain.federation_view import FederationView
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import read_task
from support.lifecycle_coverage import OBSERVED
from support.waiting import ConditionNotMet, eventually

FED: Final = FederationId("test")
TASK: Final = "tiny"
MAX_TRANSITIONS: Final = 100_000
TINY_TASK: Final = Path(__file__).with_name("tiny_task")

AgentFunction = Callable[[asyncio.Event], Awaitable[None]]
MessageT = TypeVar("MessageT", bound=Message)


def tiny_task(directory: Path) -> Task:
    """A copy of the tiny task in *directory*, which has its own code version."""
    shutil.copytree(TINY_TASK, directory / "tiny_task", ignore=shutil.ignore_patterns("__pycache__"))
    return read_task(directory / "tiny_task", open_library)


def with_schedule(task: Task, schedule: ScheduleTable) -> Task:
    """*task* with another *schedule*."""
    return task.model_copy(update={"table": task.table.model_copy(update={"schedule": schedule})})


class RunningAgent:
    """An agent that a test can stop, kill and restart."""

    def __init__(self, run: AgentFunction) -> None:
        self._run = run
        self._stop = asyncio.Event()
        self._task: asyncio.Future[None] | None = None
        self._is_awaited = False
        """Whether the test waits for the end of the agent, and so gets its exception."""

    def start(self) -> None:
        self._stop = asyncio.Event()
        self._task = asyncio.ensure_future(self._run(self._stop))

    async def stop(self) -> None:
        """Stop the agent and wait for its end. Raises its exception if it failed."""
        assert self._task
        self._stop.set()
        async with asyncio.timeout(20):
            await self._task

    async def kill(self) -> None:
        """Cancel the agent at once."""
        assert self._task
        self._task.cancel()
        _, pending = await asyncio.wait([self._task], timeout=20)
        assert not pending, "the agent does not end when it is cancelled"

    async def restart(self) -> None:
        await self.kill()
        self.start()

    async def wait_for_end(self) -> None:
        """Wait until the agent ends by itself. Raises its exception if it failed."""
        assert self._task
        self._is_awaited = True
        async with asyncio.timeout(20):
            await self._task

    @property
    def is_awaited(self) -> bool:
        """Whether the test has waited for the end of the agent."""
        return self._is_awaited

    @property
    def error(self) -> BaseException | None:
        """The exception of the agent, unless the test waits for its end."""
        if self._task is None or not self._task.done() or self._task.cancelled() or self._is_awaited:
            return None
        return self._task.exception()


@dataclass
class FederationHarness:
    """A federation under test: runs agents, publishes messages, and records all transitions and events."""

    config: AgentConfig
    bus: Bus
    """The connection of the test, on the server side."""
    view: FederationView = field(default_factory=lambda: FederationView(max_history=MAX_TRANSITIONS))
    messages: list[Message] = field(default_factory=list)
    _agents: list[RunningAgent] = field(default_factory=list)
    _buses: dict[tuple[str, str], Bus] = field(default_factory=dict)
    _open: AsyncExitStack = field(default_factory=AsyncExitStack)

    # --- actions ----------------------------------------------------------------------------

    @asynccontextmanager
    async def run_agent(self, run: AgentFunction) -> AsyncIterator[RunningAgent]:
        """Run an agent until the block ends, and check that it stops."""
        agent = RunningAgent(run)
        self._agents.append(agent)
        agent.start()
        try:
            yield agent
        except BaseException:
            await agent.kill()
            raise
        if not agent.is_awaited:
            await agent.stop()

    async def connect_as(self, agent: str, owner: str = SERVER_SIDE) -> Bus:
        """Connect to the bus as *agent* of *owner*."""
        if (agent, owner) not in self._buses:
            opening = Bus.connect(self.config.nats_url, Identity(FED, agent, owner))
            self._buses[agent, owner] = await self._open.enter_async_context(opening)
        return self._buses[agent, owner]

    async def publish(self, message: Message, *, sender: str = "test") -> None:
        """Publish *message* as the agent *sender* of the client in the message, or of the server side."""
        owner = getattr(message, "client", SERVER_SIDE) if message.family.value != "cmd" else SERVER_SIDE
        await (await self.connect_as(sender, owner)).publish(message)

    def override_plan(self, **plan: float) -> None:
        """Override the task's run plan for agents that start from now on."""
        overrides = self.config.overrides.merge(RunOverrides.model_validate(plan))
        self.config = replace(self.config, overrides=overrides)

    def clear_schedule(self) -> None:
        """Remove the schedule, so that only the test starts runs."""
        self.config = replace(self.config, task=with_schedule(self.config.task, ScheduleTable()))

    def client_config(self, name: str, number: int = 0, of: int = 1) -> ClientConfig:
        return ClientConfig(self.config, client_id(name), {"partition-id": number, "num-partitions": of})

    async def is_answered(self, request: Request[Body]) -> bool:
        """Whether an agent replies to *request*."""
        try:
            await self.bus.request(request)
        except NoResponse:
            return False
        except RequestRefused:
            return True
        return True

    # --- observations -------------------------------------------------------------------------

    @property
    def transitions(self) -> list[Transition]:
        """All transitions, in the order of the stream."""
        return [one.transition for one in self.view.history]

    def transitions_of(self, kind: str, key: str | None = None) -> list[Transition]:
        return [one for one in self.transitions if one.kind == kind and key in (None, one.key)]

    def events_of(self, kind: str, key: str | None = None) -> list[str]:
        """The events of the transitions in order: ``["started", "model_ready"]``."""
        return [one.event for one in self.transitions_of(kind, key)]

    def last_transition(self, kind: str, key: str | None = None) -> Transition:
        return self.transitions_of(kind, key)[-1]

    def run_facts(self, number: int = 1) -> RunData:
        return self.view.runs[f"{TASK}-{number}"].data

    def server_facts(self) -> ServerData:
        return self.view.servers[self.config.task.id].data

    def messages_of(self, kind: type[MessageT]) -> list[MessageT]:
        """All events of a *kind*, in order."""
        return [one for one in self.messages if isinstance(one, kind)]

    async def wait_for_state(
        self, kind: str, state: str, key: str | None = None, *, within_s: float = 40.0
    ) -> Transition:
        """Wait until an entity is in *state*."""

        def is_in_state() -> bool:
            transitions = self.transitions_of(kind, key)
            return bool(transitions) and transitions[-1].target == state

        await self.wait_until(is_in_state, f"{kind} {key or ''} to be {state}", within_s)
        return self.last_transition(kind, key)

    async def wait_for_event(
        self, kind: str, event: str, key: str | None = None, *, times: int = 1, within_s: float = 40.0
    ) -> Transition:
        """Wait until *event* has occurred *times* times."""
        await self.wait_until(
            lambda: self.events_of(kind, key).count(event) >= times,
            f"{event} of {kind} {key or ''}",
            within_s,
        )
        return [one for one in self.transitions_of(kind, key) if one.event == event][times - 1]

    async def wait_for_message(
        self, kind: type[MessageT], *, times: int = 1, within_s: float = 40.0
    ) -> MessageT:
        """Wait for a message of this *kind*."""
        await self.wait_until(lambda: len(self.messages_of(kind)) >= times, kind.name, within_s)
        return self.messages_of(kind)[times - 1]

    async def wait_until(
        self, condition: Callable[[], bool], what: str = "a condition", within_s: float = 40.0
    ) -> None:
        """Wait until *condition* holds; on a timeout, report all transitions."""

        def is_met() -> bool:
            for error in filter(None, (agent.error for agent in self._agents)):
                raise AssertionError(f"while the test waited for {what}, an agent failed") from error
            return condition()

        try:
            await eventually(is_met, within_s=within_s)
        except ConditionNotMet:
            transitions = "\n".join(
                f"  {one.kind} {one.key}: {one.source} → {one.target} {one.event} {one.reason}"
                for one in self.transitions
            )
            raise ConditionNotMet(within_s, f"{what}; the transitions were:\n{transitions}") from None


def with_refusals(agent: str, answers: dict[Any, Any]) -> dict[Any, Any]:
    """Complete *answers* with a refusal of every other request of *agent*, for a fake of it."""

    async def refuse(request: Request[Body]) -> Body:
        return Refused(reason=f"the test has no fake for {request.name}")

    return {kind: answers.get(kind, refuse) for kind in requests_answered_by(agent)}


@asynccontextmanager
async def open_federation(
    url: str, directory: Path, *, task: Task | None = None
) -> AsyncIterator[FederationHarness]:
    """Open a federation without agents, and check all lifecycles when it ends."""
    config = AgentConfig(url, FED, directory / "home", task or tiny_task(directory))
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(Bus.connect(url, Identity(FED, "test")))
        await bus.create_streams()
        fed = FederationHarness(config, bus, _open=stack)
        transitions = bus.read_stream(lifecycle_stream(FED), [subjects.wildcard_for(FED, Transition)])
        events = bus.read_stream(events_stream(FED), stream_subjects(FED))
        readers = [  # no TaskGroup: the two halves of a fixture run in two tasks
            asyncio.ensure_future(_apply_transitions(await stack.enter_async_context(transitions), fed.view)),
            asyncio.ensure_future(_collect(await stack.enter_async_context(events), fed.messages)),
        ]
        try:
            yield fed
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.wait(readers)
        check_lifecycles(await read_transitions(bus))


async def _apply_transitions(stream: AsyncIterator[StoredMessage], view: FederationView) -> None:
    async for stored in stream:
        apply_stored(view, stored)


async def _collect(stored: AsyncIterator[Any], messages: list[Any]) -> None:
    async for one in stored:
        messages.append(one.message)  # noqa: PERF401 (each at once, not all at the end)


# --- laws -------------------------------------------------------------------------------------------


async def read_transitions(bus: Bus) -> list[Transition]:
    """Read all transitions of the lifecycle stream, in order."""
    count = (await bus.list_streams() or {})[lifecycle_stream(bus.fed)]
    transitions: list[Transition] = []
    async with bus.read_stream(
        lifecycle_stream(bus.fed), [subjects.wildcard_for(bus.fed, Transition)], whole=True
    ) as stored:
        while len(transitions) < count:
            one = (await asyncio.wait_for(anext(stored), 10)).message
            assert isinstance(one, Transition)
            transitions.append(one)
    return transitions


def check_lifecycles(transitions: list[Transition]) -> None:
    """Check that each entity started in its initial state, and that its transitions are legal and without gaps."""
    entities: dict[tuple[str, str], list[Transition]] = defaultdict(list)
    for one in transitions:
        entities[one.kind, one.key].append(one)
    for (kind, key), history in entities.items():
        lifecycle = LIFECYCLES[kind]
        assert (history[0].source, history[0].target) == ("", lifecycle.initial), (
            f"{kind} {key} began with {history[0]}"
        )
        for before, after in pairwise(history):
            assert after.source == before.target, (
                f"{kind} {key} jumped from {before.target} to {after.source}"
            )
            assert after.is_legal, f"{kind} {key}: no arrow {after.source} –{after.event}→ {after.target}"
            OBSERVED.add((kind, after.source, after.event, after.target))
