"""Requests to the Flower server that overlap: with the start of a session, its end, or a repetition."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.server_machine import NAME, OLD, PLAN, RUN, model, task_at

from fedbus.agents.common.process_orders import ProcessConfig, ServerProcessConfig
from fedbus.agents.flower_server.agent import FlowerServer
from fedbus.bus.bus import Bus
from fedbus.contracts.flower_server import (
    FindServer,
    ServerFound,
    ServerLost,
    ServerStarting,
    StartServer,
    StopServer,
)
from fedbus.contracts.message import Body, Message, Refused, Request
from fedbus.contracts.model import Artifact
from fedbus.stores.models.open import ModelStore

START = StartServer(
    task=NAME, run=RUN, plan=PLAN, artifact=Artifact.model_validate(model(1).model_dump()), code_version=OLD
)
FIND = FindServer(task=NAME, run=RUN)


class HeldBus:
    """A bus whose acknowledgements and deletions wait until `answers` is set."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.answers.set()
        self.published: list[Message] = []
        self._handlers: Mapping[type[Request[Body]], Any] = {}

    async def create_streams(self) -> None: ...

    async def current_states(self, *_: str) -> list[Message]:
        return []

    @asynccontextmanager
    async def serve(self, handlers: Mapping[type[Request[Body]], Any], **_: str) -> AsyncIterator[None]:
        self._handlers = handlers
        yield

    async def delete_consumer(self, *_: object, **__: str) -> None:
        await self.answers.wait()

    async def publish(self, message: Message) -> None:
        self.published.append(message)
        await self.answers.wait()

    async def request(self, request: Request[Any]) -> Body:
        reply: Body = await self._handlers[type(request)](request)
        return reply


class HeldSessions:
    """Sessions that last until they are lost or stopped."""

    has_shared_files = False

    def __init__(self) -> None:
        self.started = 0
        self.loss = asyncio.Event()

    async def run(self, config: ServerProcessConfig, stop: asyncio.Event) -> str:
        self.started += 1
        ends = [asyncio.create_task(event.wait()) for event in (self.loss, stop)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        return "" if stop.is_set() else "it was killed"

    async def remove_orphans(self) -> None: ...


@pytest.fixture
def bus() -> HeldBus:
    return HeldBus()


@pytest.fixture
async def sessions(bus: HeldBus, tmp_path: Path) -> AsyncIterator[HeldSessions]:
    sessions, stop = HeldSessions(), asyncio.Event()
    config = ProcessConfig(nats_url="", federation="dev", task=task_at(OLD))
    store = cast("ModelStore", SimpleNamespace(url="file:///models"))
    agent = FlowerServer(cast("Bus", bus), config, store, logs=tmp_path, launcher=sessions)
    async with asyncio.TaskGroup() as group:
        group.create_task(agent.run(stop))
        await agent.ready.wait()
        yield sessions
        bus.answers.set()
        stop.set()


async def run_ready_tasks() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_lost_session_is_down_before_its_report_is_stored(
    bus: HeldBus, sessions: HeldSessions
) -> None:
    await bus.request(START)
    assert await bus.request(FIND) == ServerFound(up=True)
    bus.answers.clear()
    sessions.loss.set()
    await run_ready_tasks()
    assert [type(one) for one in bus.published] == [ServerLost]
    assert await bus.request(FIND) == ServerFound(up=False)


async def test_a_repeated_start_keeps_the_session(bus: HeldBus, sessions: HeldSessions) -> None:
    assert await bus.request(START) == ServerStarting()
    assert await bus.request(START) == ServerStarting()
    await run_ready_tasks()
    assert sessions.started == 1


async def test_a_lost_session_is_started_again_by_the_same_request(
    bus: HeldBus, sessions: HeldSessions
) -> None:
    await bus.request(START)
    sessions.loss.set()
    await run_ready_tasks()
    assert await bus.request(START) == ServerStarting()
    await run_ready_tasks()
    assert sessions.started == 2


async def test_a_run_stopped_during_its_start_gets_no_session(bus: HeldBus, sessions: HeldSessions) -> None:
    bus.answers.clear()
    start = asyncio.create_task(bus.request(START))
    await run_ready_tasks()
    await bus.request(StopServer(task=NAME, run=RUN))
    bus.answers.set()
    assert await start == Refused(reason=f"{RUN} was stopped")
    assert await bus.request(START) == Refused(reason=f"{RUN} was stopped")  # a repetition that was queued
    await run_ready_tasks()
    assert sessions.started == 0
