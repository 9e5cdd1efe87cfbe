"""Two scheduler processes of one task; the one with the lease is frozen and resumed."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support import NatsServer, eventually
from support.fake_server_manager import FakeServerManager
from support.federation import FED, TASK, FederationHarness, open_federation, tiny_task

from fedbus.contracts.scheduling import ScheduleData
from fedbus.contracts.server import ServerEvent
from fedbus.contracts.serving import DriftDetected

pytestmark = pytest.mark.fault

SCHEDULE = """
[tool.fedbus.schedule]
when = "drift"
"""


@pytest.fixture
async def fed(nats: NatsServer, tmp_path: Path) -> AsyncIterator[FederationHarness]:
    task = tiny_task(tmp_path)
    table = Path(task.path) / "pyproject.toml"
    table.write_text(table.read_text() + SCHEDULE)
    async with open_federation(nats.url, tmp_path, task=task) as fed:
        yield fed


@asynccontextmanager
async def run_scheduler(
    fed: FederationHarness, output_file: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {
        **os.environ,
        "FEDBUS_NATS_URL": fed.config.nats_url,
        "FEDBUS_FEDERATION": FED,
        "FEDBUS_HOME": str(fed.config.home),
    }
    with output_file.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fedbus.app.cli.main", "agent", "workflow-scheduler", "--task", fed.config.task.path,
            env=environment, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            await process.wait()


def lease_holder(fed: FederationHarness) -> str:
    facts = fed.last_transition("schedule").facts
    assert isinstance(facts, ScheduleData)
    return facts.holder


def requested_runs(fed: FederationHarness) -> list[str]:
    return [transition.key for transition in fed.transitions_of("run") if transition.event == "requested"]


async def publish_drift(fed: FederationHarness, client: str) -> None:
    event = DriftDetected(task=TASK, client=client, of="inputs", feature="mean", score=0.5)
    await fed.publish(event, sender="inference")


async def fail_run(fed: FederationHarness, server: FakeServerManager, number: int) -> None:
    await fed.wait_for_state("run", "recruiting", f"{TASK}-{number}")
    await server.transition(ServerEvent.RECRUITING_EXPIRED)
    await fed.wait_for_state("run", "failed", f"{TASK}-{number}")


async def test_a_resumed_scheduler_fires_no_trigger_twice(fed: FederationHarness, tmp_path: Path) -> None:
    async with (
        FakeServerManager.open(fed) as server,
        server.serve(),
        run_scheduler(fed, tmp_path / "first.txt") as first,
    ):
        await server.publish_first_model()
        await fed.wait_for_event("schedule", "started", within_s=60)
        frozen_holder = lease_holder(fed)
        async with run_scheduler(fed, tmp_path / "second.txt"):
            second_output = tmp_path / "second.txt"
            await eventually(lambda: "Lease held by another agent" in second_output.read_text(), within_s=60)
            await publish_drift(fed, "c1")
            await fail_run(fed, server, 1)

            first.send_signal(signal.SIGSTOP)
            await publish_drift(fed, "c2")  # both schedulers receive it
            await fed.wait_for_event("schedule", "taken_over", within_s=60)
            assert lease_holder(fed) != frozen_holder
            await fail_run(fed, server, 2)

            first.send_signal(signal.SIGCONT)
            await eventually(
                lambda: "Lease held by another agent" in (tmp_path / "first.txt").read_text(), within_s=60
            )
            await publish_drift(fed, "c3")
            await fail_run(fed, server, 3)
            assert lease_holder(fed) != frozen_holder
            assert first.returncode is None, "it waits for the lease"
    assert requested_runs(fed) == [f"{TASK}-1", f"{TASK}-2", f"{TASK}-3"]
    causes = [
        transition.reason for transition in fed.transitions_of("schedule") if transition.event == "fired"
    ]
    assert len(causes) == 3, "each drift fired once"
