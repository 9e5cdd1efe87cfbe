"""A run of a task's directory on a bus in memory: what the fleet does, in this process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedbus.contracts.client import ClientJoined
from fedbus.contracts.run import RoundResult, RunPlan, Scalar
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import ClientJob, ClientResponse, ClientSession, IncomingMessage, ServerJob
from fedbus.learning.memory_bus import MemoryBus, MemoryDevice
from fedbus.learning.messenger import BusMessenger
from fedbus.learning.seeding import seed_client, seed_server
from fedbus.learning.task_model import first_arrays
from fedbus.learning.weights import Arrays
from fedbus.stores.tasks.task_directory import read_task

RUN = "run-1"


@contextmanager
def own_numpy_state() -> Iterator[None]:
    """Restore NumPy's global generator at the end, as if the block had run in another process."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


@dataclass
class SeededSession:
    """Seeds the generators before each message, as the process of a client does. One session runs at a time."""

    session: ClientSession
    job: ClientJob
    lock: threading.Lock

    def handle(self, message: IncomingMessage) -> ClientResponse:
        with self.lock, own_numpy_state():
            seed_client(
                self.job.plan.seed, client=self.job.client, round_number=message.round, kind=message.kind
            )
            return self.session.handle(message)

    def close(self) -> None:
        self.session.close()


@dataclass
class BusRunResult:
    """The result of a run on the bus."""

    final: Arrays = field(default_factory=dict)
    rounds: list[RoundResult] = field(default_factory=list)
    sessions: dict[str, ClientSession] = field(default_factory=dict)

    def metric(self, name: str) -> list[float]:
        return [result.metrics[name] for result in self.rounds if name in result.metrics]


async def run_on_bus(
    directory: Path,
    *,
    clients: int,
    rounds: int,
    node_config: dict[str, Scalar] | None = None,
    first_round: int = 1,
    **plan: Any,
) -> BusRunResult:
    """Run the task in *directory* with as many *clients*, named as those of a simulation."""
    task = read_task(directory, open_library)
    library = open_library(task.table.library)
    run_plan = RunPlan(rounds=rounds, round_s=60.0, recruit_s=60.0, **plan)
    bus, result = MemoryBus(), BusRunResult()
    messenger = BusMessenger(bus, task=task.id, run=RUN, plan=run_plan, lost_after_s=600.0)
    devices, one_at_a_time = [], threading.Lock()
    for number in range(clients):
        client = f"client-{number:04}"
        config = {"partition-id": number, "num-partitions": clients, **(node_config or {})}
        job = ClientJob(task=task, client=client, run=RUN, plan=run_plan, node_config=config)
        result.sessions[client] = library.open_client(job)
        session = SeededSession(result.sessions[client], job, one_at_a_time)
        device = MemoryDevice(session, client, bus, messenger.deliver, config)
        bus.subscribers[client] = device.receive
        devices.append(device)
        messenger.deliver(ClientJoined(task=task.id, client=client, run=RUN))
    seed_server(run_plan.seed)
    model = first_arrays(task) or {}
    server_job = ServerJob(task=task, run=RUN, plan=run_plan, model=model, first_round=first_round)
    try:
        on_round = lambda one, _: result.rounds.append(one)  # noqa: E731
        final = await asyncio.to_thread(lambda: library.open_server(server_job).run(messenger, on_round))
        result.final = final or {}
    finally:
        messenger.close("the run is over")
        for device in devices:
            await device.close()
    return result
