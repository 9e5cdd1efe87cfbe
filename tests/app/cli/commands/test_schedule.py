"""`fedbus run schedule`: trigger, next run and last run, as text and as JSON."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support import NatsServer
from support.cli import FedbusCli
from support.simulated_federation import TASK, SimulatedFederation

from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.scheduling import ScheduleData, ScheduleRule

NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
RULE = ScheduleRule(
    when="cron '0 3 * * *' and drift on 2 clients", timezone="Europe/Berlin", quiet="hour in 8..18", at_most=3
)


@pytest.fixture
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(FederationId("dev"), "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus)


@pytest.fixture
def fedbus(nats: NatsServer, tmp_path: Path) -> FedbusCli:
    return FedbusCli(tmp_path / "home", FEDBUS_NATS_URL=nats.url, TZ="UTC")


def schedule_facts(started: int = 1, **more: object) -> ScheduleData:
    data = {
        "task": TASK,
        "since": NOON,
        "clock_since": NOON,
        "rule": RULE.model_dump(),
        "started": started,
    }
    return ScheduleData.model_validate(data | more)


async def test_schedule_shows_trigger_next_run_and_last_run(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    waits = schedule_facts(
        next_at=NOON,
        awaits=("cron '0 3 * * *'", "drift on 2 clients (1 so far)"),
        run="mnist-4",
        fired_at=NOON,
        fired_for="drift on 2 clients (c1, c2)",
    )
    await simulation.transition(waits, "planned", "watching", "watching")
    result = await fedbus("run", "schedule")
    lines = {line[:17].strip(): line[17:].strip() for line in result.out.splitlines()}

    assert result.code == 0
    assert lines["trigger"] == RULE.when
    assert (lines["time zone"], lines["quiet hours"]) == ("Europe/Berlin", "hour in 8..18")
    assert lines["next run"] == "2026-03-14 12:00:00 UTC"
    assert [line[17:].strip() for line in result.out.splitlines() if line.startswith("  waits for ")] == list(
        waits.awaits
    )
    assert lines["last run"].startswith("mnist-4, ")
    assert lines["started by"] == "drift on 2 clients (c1, c2)"
    (one,) = (await fedbus("run", "schedule", "--json")).facts
    assert (one["rule"]["when"], one["next_at"]) == (RULE.when, "2026-03-14T12:00:00+00:00")


async def test_postponed_runs_and_finished_schedules_are_shown(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    due = schedule_facts(cause="drift on 2 clients (c1, c2)", due_since=NOON)
    await simulation.transition(due, "postponed", "due", "due", "mnist-4 is in progress")
    result = (await fedbus("run", "schedule")).out
    assert "due because     drift on 2 clients (c1, c2)" in result
    assert "postponed       mnist-4 is in progress" in result

    await simulation.transition(schedule_facts(started=3, next_at=NOON), "fired", "due", "watching")
    assert "next run        none: all 3 runs were started" in (await fedbus("run", "schedule")).out


async def test_without_schedules_a_note_is_printed(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    result = await fedbus("run", "schedule")
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith("no schedule: runs start on request only.")
