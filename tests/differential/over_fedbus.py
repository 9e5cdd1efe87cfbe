"""Runs a case over fedbus: its Grid, hosts, codec and hooks, on the bus in memory of tests/learning."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from differential.cases import CASES, App, FlowerCase
from differential.recording import RECORD, Recording, describe, read
from learning.flower.memory_bus import RUN, TASK, MemoryFederation, open_memory_federation

from fedbus.contracts.client import ClientJoined
from fedbus.contracts.run import RoundResult, Scalar
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning.flower.client_app_host import ClientAppHost
from fedbus.learning.flower.node_ids import node_id
from fedbus.learning.flower.server_app_host import ServerAppHost
from fedbus.learning.library import ClientJob, NoUpdates, ServerJob, TrainingFailed
from fedbus.learning.memory_bus import MemoryDevice
from fedbus.learning.weights import Arrays

MODULE = """
from differential.over_fedbus import build
app = build({name!r})
server, client = app.server, app.client
"""


def build(name: str) -> App:
    """Build the apps of a case in the generated module, which fedbus loads by reference."""
    return CASES[name].build()


@dataclass
class BusRun:
    """The outcome of a case over fedbus."""

    recording: Recording
    final: Arrays | None = None
    rounds: list[tuple[RoundResult, Arrays]] = field(default_factory=list)


async def run_over_fedbus(
    case: FlowerCase,
    directory: Path,
    *,
    model: Arrays | None = None,
    first_round: int = 1,
    rounds: int = 0,
    **table: Any,
) -> BusRun:
    """Run *case*, from *model* if there is a stored one. *table* are keys of ``[tool.fedbus]``."""
    record = directory / "fedbus.jsonl"
    record.unlink(missing_ok=True)
    module = MODULE.format(name=case.name)
    plan = {"rounds": rounds, "recruit_s": 20.0, "round_s": 60.0, **case.plan}
    async with open_memory_federation(directory, server=module, client=module, **plan) as federation:
        package = federation.package
        task = Task(
            table=TaskTable.model_validate({"task": TASK, **table}),
            app={"serverapp": f"{package}.server_app:server", "clientapp": f"{package}.client_app:client"},
            run_config={**case.config, RECORD: str(record)},
            code_version="v1",
            path=str(federation.path),
        )
        for number in range(case.clients):
            _add_client(federation, task, number, case.clients)
        job = ServerJob(task=task, run=RUN, plan=federation.plan, model=model or {}, first_round=first_round)
        run = BusRun({})
        on_round = lambda result, arrays: run.rounds.append((result, arrays))  # noqa: E731
        outcome: Any = None
        try:
            run.final = await asyncio.to_thread(
                lambda: ServerAppHost(job).run(federation.messenger, on_round)
            )
        except NoUpdates:
            pass  # fedbus fails such a run after its app has ended; the app observes what it does under Flower
        except TrainingFailed as error:
            outcome = describe(error.__cause__ or error)
    numbers = {node_id(f"c{number}"): number for number in range(case.clients)}
    run.recording = read(record, numbers) | {"outcome": [outcome]}
    return run


def _add_client(federation: MemoryFederation, task: Task, number: int, clients: int) -> None:
    name = f"c{number}"
    node_config: dict[str, Scalar] = {"partition-id": number, "num-partitions": clients}
    job = ClientJob(task=task, client=name, run=RUN, plan=federation.plan, node_config=node_config)
    device = MemoryDevice(ClientAppHost(job), name, federation.bus, federation.messenger.deliver, node_config)
    federation.devices[name] = device
    federation.bus.subscribers[name] = device.receive
    federation.messenger.deliver(ClientJoined(task=TASK, client=name, run=RUN))
