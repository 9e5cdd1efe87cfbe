"""A federation of one run on a bus in memory, in which `fedbus.learning.conformance` tests a training library.

The server side runs in the calling thread, each client in a thread of its own.
"""

import asyncio
import json
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from fedbus.contracts.client import ClientJoined, FailTrain
from fedbus.contracts.run import RoundResult, RunPlan, Scalar
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import ClientJob, ClientSession, ServerJob, TrainingLibrary
from fedbus.learning.memory_bus import MemoryBus, MemoryDevice
from fedbus.learning.messenger import BusMessenger
from fedbus.learning.weights import Arrays


def model(value: float = 0.0) -> Arrays:
    """Return the suite's model with all elements at *value*."""
    return {"w": np.full(3, value, np.float32)}


@dataclass
class SuiteFederation:
    """One run of a task: its messenger on a bus in memory, and its clients."""

    library: TrainingLibrary
    task: Task
    plan: RunPlan
    bus: MemoryBus
    messenger: BusMessenger
    loop: asyncio.AbstractEventLoop
    run: str
    devices: dict[str, MemoryDevice] = field(default_factory=dict)
    rounds: list[tuple[RoundResult, Arrays]] = field(default_factory=list)
    """The result and the model of each round that the library reported."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    """Tasks on the event loop, until the end of the test."""

    def add_client(
        self,
        number: int,
        *,
        is_silent: bool = False,
        wrap: Callable[[ClientSession], ClientSession] = lambda session: session,
    ) -> MemoryDevice:
        """Open the session of client ``c<number>``, and let it join. A *silent* client never replies."""
        name = f"c{number}"
        node_config: dict[str, Scalar] = {"partition-id": number, "num-partitions": 4}
        job = ClientJob(task=self.task, client=name, run=self.run, plan=self.plan, node_config=node_config)
        session = wrap(self.library.open_client(job))
        device = MemoryDevice(
            session, name, self.bus, self.messenger.deliver, node_config, is_silent=is_silent
        )
        self.devices[name] = device
        self.bus.subscribers[name] = device.receive
        self.call(lambda: self.messenger.deliver(ClientJoined(task=self.task.id, client=name, run=self.run)))
        return device

    def lose_client(self, name: str) -> None:
        """Let the client leave the run, as its agent does if its process dies."""
        lost = FailTrain(task=self.task.id, client=name, run=self.run, reason="the battery is low")
        self.call(lambda: self.messenger.deliver(lost))

    def train(
        self,
        start: Arrays,
        *,
        first_round: int = 1,
        on_round: Callable[[RoundResult], None] = lambda _: None,
    ) -> Arrays | None:
        """Run the server side in this thread to its end, and return what the library returns."""
        job = ServerJob(task=self.task, run=self.run, plan=self.plan, model=start, first_round=first_round)
        session = self.library.open_server(job)

        def record(result: RoundResult, arrays: Arrays) -> None:
            self.rounds.append((result, {name: np.array(array) for name, array in arrays.items()}))
            on_round(result)

        try:
            return session.run(self.messenger, record)
        finally:
            session.close()

    @property
    def results(self) -> list[RoundResult]:
        """The results of the rounds that trained."""
        return [result for result, _ in self.rounds if result.round > 0]

    def call(self, function: Callable[[], object]) -> None:
        """Call *function* on the event loop, and wait."""

        async def run() -> None:
            function()

        asyncio.run_coroutine_threadsafe(run(), self.loop).result()

    def call_when(self, condition: Callable[[], object], function: Callable[[], object]) -> None:
        """Call *function* on the event loop as soon as *condition* holds."""

        async def wait_and_call() -> None:
            while not condition():  # noqa: ASYNC110 - the condition may be anything
                await asyncio.sleep(0.01)
            function()

        self.call(lambda: self.tasks.append(self.loop.create_task(wait_and_call())))

    def expire_messages_to(self, name: str) -> None:
        """Let the deadline of a message pass whenever this client is the only one without a reply."""
        messenger, passed_s = self.messenger, 0.0
        messenger._now = lambda: self.loop.time() + passed_s  # type: ignore[method-assign]  # noqa: SLF001

        async def expire() -> None:
            nonlocal passed_s
            while True:
                if {pending.sent.client for pending in messenger._pending.values()} == {name}:  # noqa: SLF001
                    passed_s += self.plan.round_s
                    messenger._on_timer()  # noqa: SLF001
                await asyncio.sleep(0.01)

        self.call(lambda: self.tasks.append(self.loop.create_task(expire())))

    async def close(self) -> None:
        self.messenger.close("the test is over")
        for task in self.tasks:
            task.cancel()
        for device in self.devices.values():
            await device.close()
            device.session.close()


@dataclass
class SuiteRun:
    """Opens runs of one library."""

    library_name: str
    plan: Mapping[str, float]
    """Values of the run plan that replace those of the suite."""
    directory: Path
    package: str
    loop: asyncio.AbstractEventLoop

    @property
    def library(self) -> TrainingLibrary:
        return open_library(self.library_name)

    @property
    def task(self) -> Task:
        return read_suite_task(self.library_name, self.directory)

    @contextmanager
    def open(self, **plan: Any) -> Iterator[SuiteFederation]:
        """Open a federation with a run of the task. *plan* are values of its `RunPlan`."""
        defaults = {"rounds": 2, "round_s": 20.0, "recruit_s": 10.0, "quorum": 2, **self.plan}
        run_plan = RunPlan(**{**defaults, **plan})
        bus, run = MemoryBus(), f"suite-{uuid4().hex[:8]}"

        async def make() -> SuiteFederation:
            messenger = BusMessenger(bus, task=self.task.id, run=run, plan=run_plan, lost_after_s=3600.0)
            return SuiteFederation(self.library, self.task, run_plan, bus, messenger, self.loop, run)

        federation = asyncio.run_coroutine_threadsafe(make(), self.loop).result()
        try:
            yield federation
        finally:
            asyncio.run_coroutine_threadsafe(federation.close(), self.loop).result()


def read_suite_task(library: str, directory: Path) -> Task:
    """Read the suite's task through *library*."""
    document = tomllib.loads((directory / "pyproject.toml").read_text(encoding="utf-8"))
    app = open_library(library).read_app(document, directory)
    assert app.problems == (), app.problems
    table = TaskTable.model_validate({"task": "suite", **document.get("tool", {}).get("fedbus", {})})
    return Task(
        table=table,
        app=dict(app.references),
        app_rounds=app.rounds or 0,
        rounds_key=app.rounds_key,
        run_config=dict(app.run_config),
        code_version="suite",
        path=str(directory),
    )


def train_in_process(library: str, directory: str, start: str) -> None:
    """Train the suite's task in this process, and print the mean of the final model as the last line."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    with SuiteRun(library, {}, Path(directory), "", loop).open(rounds=2) as federation:
        federation.add_client(0)
        federation.add_client(1)
        final = federation.train(model(float(start)))
    print(json.dumps(float(np.mean(next(iter((final or {}).values()))))), flush=True)
