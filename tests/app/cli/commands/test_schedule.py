"""`fedbus run schedule`: what a schedule is, what it waits for and what it did, in words and for programs."""

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
    told = {"task": TASK, "since": NOON, "clock_since": NOON, "rule": RULE.model_dump(), "started": started}
    return ScheduleData.model_validate(told | more)


async def test_it_tells_the_rule_the_next_time_what_is_awaited_and_what_was_last(
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
    said = await fedbus("run", "schedule")
    lines = {line[:17].strip(): line[17:].strip() for line in said.out.splitlines()}

    assert said.code == 0
    assert lines["trigger"] == RULE.when
    assert (lines["time zone"], lines["quiet hours"]) == ("Europe/Berlin", "hour in 8..18")
    assert lines["next run"] == "2026-03-14 12:00:00 UTC"
    assert [line[17:].strip() for line in said.out.splitlines() if line.startswith("  waits for ")] == list(
        waits.awaits
    )
    assert lines["last run"].startswith("mnist-4, ")
    assert lines["started by"] == "drift on 2 clients (c1, c2)"
    (one,) = (await fedbus("run", "schedule", "--json")).facts
    assert (one["rule"]["when"], one["next_at"]) == (RULE.when, "2026-03-14T12:00:00+00:00")


async def test_a_run_that_is_held_back_and_a_schedule_that_is_used_up_are_told(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    due = schedule_facts(cause="drift on 2 clients (c1, c2)", due_since=NOON)
    await simulation.transition(due, "postponed", "due", "due", "mnist-4 is under way")
    said = (await fedbus("run", "schedule")).out
    assert "due because     drift on 2 clients (c1, c2)" in said
    assert "postponed       mnist-4 is under way" in said

    await simulation.transition(schedule_facts(started=3, next_at=NOON), "fired", "due", "watching")
    assert "next run        none: all 3 runs were started" in (await fedbus("run", "schedule")).out


async def test_where_there_is_none_it_says_so(simulation: SimulatedFederation, fedbus: FedbusCli) -> None:
    said = await fedbus("run", "schedule")
    assert (said.code, said.out) == (0, "")
    assert said.err.startswith("no schedule: runs start on request only.")
