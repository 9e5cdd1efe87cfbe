"""Runs a case over fedbus: its Grid, hosts, codec and hooks, on the bus in memory of tests/learning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from differential.cases import CASES, App, Case
from differential.recording import RECORD, Recording, describe, read
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.run import RoundResult, RunPlan, Scalar
from fedbus.learning.flower.client_app_host import ClientAppHost
from fedbus.learning.flower.node_ids import node_id
from fedbus.learning.flower.server_app_host import ServerAppFailed, ServerJob, run_server_app
from fedbus.learning.weights import Arrays
from learning.flower.memory_bus import RUN, TASK, MemoryDevice, MemoryFederation, open_memory_federation

import asyncio

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
    rounds: list[tuple[RoundResult, Arrays]] | None = None


async def run_over_fedbus(case: Case, directory: Path, *, model: Arrays | None = None, **job: Any) -> BusRun:
    """Run *case*, from *model* if there is a stored one, and return what it observed."""
    record = directory / "fedbus.jsonl"
    record.unlink(missing_ok=True)
    config: dict[str, Scalar] = {**case.config, RECORD: str(record)}
    outcome: Any = None
    final: Arrays | None = None
    plan = {"recruit_s": 20.0, "round_s": 60.0, **case.plan}
    module = MODULE.format(name=case.name)
    async with open_memory_federation(directory, server=module, client=module, **plan) as federation:
        run_plan = federation.plan.model_copy(update={"rounds": case.plan.get("rounds", 0)})
        for number in range(case.clients):
            _add_client(federation, number, case.clients, config)
        server_job = ServerJob(
            path=federation.path,
            serverapp=f"{federation.package}.server_app:server",
            plan=run_plan,
            model=model or {},
            run_config=config,
            **job,
        )
        rounds: list[tuple[RoundResult, Arrays]] = []
        on_round = lambda result, arrays: rounds.append((result, arrays))  # noqa: E731
        try:
            final = await asyncio.to_thread(run_server_app, federation.grid, server_job, on_round)
        except ServerAppFailed as error:
            outcome = describe(error.__cause__ or error)
    numbers = {node_id(f"c{number}"): number for number in range(case.clients)}
    return BusRun(read(record, numbers) | {"outcome": [outcome]}, final, rounds)


def _add_client(federation: MemoryFederation, number: int, clients: int, config: dict[str, Scalar]) -> None:
    name = f"c{number}"
    host = ClientAppHost(
        federation.path,
        f"{federation.package}.client_app:client",
        client=name,
        run=RUN,
        run_config=dict(config),
        node_config={"partition-id": number, "num-partitions": clients},
    )
    device = MemoryDevice(host, name, federation.bus, federation.grid.deliver)
    federation.devices[name] = device
    federation.bus.subscribers[name] = device.receive
    federation.grid.deliver(ClientJoined(task=TASK, client=name, run=RUN))
