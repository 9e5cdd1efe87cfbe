"""A time window of both streams, in the order of time."""

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support import NatsServer, eventually
from support.cli import FedbusCli
from support.simulated_federation import TASK, SimulatedFederation
from support.terminal import open_terminal

from fedbus.app.failures import CliError
from fedbus.app.views.event_replay import TimeWindow, pace, read_window, resolve_window
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.client import ClientData, ClientDeclined, ClientJoined
from fedbus.contracts.identifiers import FederationId

FED = FederationId("test")
BEGIN = datetime(2026, 3, 14, 12, tzinfo=UTC)


async def simulate_run(bus: Bus) -> SimulatedFederation:
    await bus.create_streams()
    simulation = SimulatedFederation(bus, clock=BEGIN)
    await simulation.create_clients(["c1"])
    run = simulation.make_run_facts(1, 0)
    await simulation.transition(run, "recruiting_started", "requested", "recruiting")
    simulation.advance(1)
    await simulation.publish(ClientJoined(task=TASK, client="c1", run=run.run))
    simulation.advance(1)
    await simulation.transition(
        ClientData(task=TASK, client="c1", run=run.run), "client_start", "serving", "learning", "the run"
    )
    simulation.advance(1)
    await simulation.publish(ClientDeclined(task=TASK, client="c2", run="mnist-2", reason="another run's"))
    await simulation.transition(run, "cancelled", "recruiting", "cancelled")
    return simulation


async def message_names(bus: Bus, window: TimeWindow) -> list[str]:
    async with aclosing(read_window(bus, window)) as messages:
        return [getattr(one.message, "kind", one.message.name) async for one in messages]


async def test_a_replayed_run_is_in_order_and_without_other_runs(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await simulate_run(bus)
        window = await resolve_window(bus, None, None, "mnist-1")
        assert await message_names(bus, window) == ["run", "joined", "client", "run"]


async def test_a_window_starts_with_the_first_message_in_it(
    nats: NatsServer,
) -> None:
    async with (
        Bus.connect(nats.url, Identity(FED, "test")) as bus,
        Bus.connect(nats.url, Identity(FED, "client-manager", "c1")) as device,
    ):
        await bus.create_streams()
        for _ in range(20):
            await device.publish(ClientJoined(task=TASK, client="c1", run="mnist-1"))
        begin = await wait_for_later_time()
        for _ in range(10):
            await device.publish(ClientJoined(task=TASK, client="c1", run="mnist-2"))
            await device.publish(ClientDeclined(task=TASK, client="c1", run="mnist-2", reason="resting"))
        for _ in range(20):
            await device.publish(ClientDeclined(task=TASK, client="c1", run="mnist-3", reason="resting"))
        names = await message_names(bus, TimeWindow(begin, datetime.now(UTC)))
        assert names == ["joined", "declined"] * 10 + ["declined"] * 20


async def wait_for_later_time() -> datetime:
    """Return a time after all messages so far; envelopes have times of whole milliseconds."""
    before = datetime.now(UTC)
    await eventually(lambda: datetime.now(UTC) - before > timedelta(milliseconds=5))
    return datetime.now(UTC) - timedelta(milliseconds=2)


async def test_a_window_ends_at_its_end_time(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await simulate_run(bus)
        window = await resolve_window(bus, BEGIN + timedelta(seconds=1), BEGIN + timedelta(seconds=2), None)
        assert await message_names(bus, window) == ["joined", "client"]


async def test_a_replay_publishes_nothing(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await simulate_run(bus)
        before = await bus.list_streams()
        assert await message_names(bus, TimeWindow(BEGIN, datetime.now(UTC)))
        assert await bus.list_streams() == before


async def test_an_empty_replay_ends_at_once(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.create_streams()
        assert await message_names(bus, TimeWindow(BEGIN, datetime.now(UTC))) == []


async def test_a_replay_keeps_its_speed(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        simulation = await simulate_run(bus)
        window = TimeWindow(BEGIN, simulation.clock, "mnist-1")
        async with aclosing(pace(read_window(bus, window), speed=10)) as messages:
            assert len([one async for one in messages]) == 4


async def test_a_terminal_shows_progress_and_a_pipe_only_messages(nats: NatsServer, tmp_path: Path) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await simulate_run(bus)
    arguments = ("events", "replay", "--run", "mnist-1")
    fedbus = FedbusCli(tmp_path, FEDBUS_NATS_URL=nats.url, FEDBUS_FEDERATION=FED)
    piped = await fedbus(*arguments)
    assert (piped.code, piped.err, len(piped.out.splitlines())) == (0, "", 4)
    async with open_terminal(*arguments, environment=fedbus.environment) as shown:
        async with asyncio.timeout(60):
            assert await shown.process.wait() == 0
        await eventually(lambda: shown.raw.count("→") == 3)
    assert "replaying messages of" in shown.raw
    assert "run test mnist-1 requested → recruiting" in shown.text, "80 characters have no room for columns"


async def test_an_unknown_run_is_named(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.create_streams()
        with pytest.raises(CliError, match="no run mnist-9 in federation test"):
            await resolve_window(bus, None, None, "mnist-9")
