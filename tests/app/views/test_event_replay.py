"""A window of the past, from both streams, in the order in which it was said."""

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
    told = SimulatedFederation(bus, clock=BEGIN)
    await told.create_clients(["c1"])
    run = told.make_run_facts(1, 0)
    await told.transition(run, "recruiting_started", "requested", "recruiting")
    told.advance(1)
    await told.publish(ClientJoined(task=TASK, client="c1", run=run.run))
    told.advance(1)
    await told.transition(
        ClientData(task=TASK, client="c1", run=run.run), "client_start", "serving", "learning", "the run"
    )
    told.advance(1)
    await told.publish(ClientDeclined(task=TASK, client="c2", run="mnist-2", reason="another run's"))
    await told.transition(run, "cancelled", "recruiting", "cancelled")
    return told


async def message_names(bus: Bus, asked: TimeWindow) -> list[str]:
    async with aclosing(read_window(bus, asked)) as said:
        return [getattr(one.message, "kind", one.message.word) async for one in said]


async def test_a_run_is_told_again_in_order_and_nothing_else_with_it(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await simulate_run(bus)
        asked = await resolve_window(bus, None, None, "mnist-1")
        assert await message_names(bus, asked) == ["run", "joined", "client", "run"]


async def test_nothing_is_left_out_at_the_beginning_of_a_window_whatever_words_were_said_before_it(
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
            await device.publish(ClientDeclined(task=TASK, client="c1", run="mnist-2", reason="it rests"))
        for _ in range(20):
            await device.publish(ClientDeclined(task=TASK, client="c1", run="mnist-3", reason="it rests"))
        told = await message_names(bus, TimeWindow(begin, datetime.now(UTC)))
        assert told == ["joined", "declined"] * 10 + ["declined"] * 20


async def wait_for_later_time() -> datetime:
    """A moment after all that was said so far: envelopes have times of whole milliseconds."""
    before = datetime.now(UTC)
    await eventually(lambda: datetime.now(UTC) - before > timedelta(milliseconds=5))
    return datetime.now(UTC) - timedelta(milliseconds=2)


async def test_a_window_ends_where_it_is_to_end(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await simulate_run(bus)
        asked = await resolve_window(bus, BEGIN + timedelta(seconds=1), BEGIN + timedelta(seconds=2), None)
        assert await message_names(bus, asked) == ["joined", "client"]


async def test_nobody_on_the_bus_hears_the_past_again(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await simulate_run(bus)
        before = await bus.list_streams()
        assert await message_names(bus, TimeWindow(BEGIN, datetime.now(UTC)))
        assert await bus.list_streams() == before


async def test_an_empty_past_ends_at_once(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.create_streams()
        assert await message_names(bus, TimeWindow(BEGIN, datetime.now(UTC))) == []


async def test_a_replay_keeps_the_pace_that_it_is_asked_for(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        told = await simulate_run(bus)
        asked = TimeWindow(BEGIN, told.clock, "mnist-1")
        async with aclosing(pace(read_window(bus, asked), speed=10)) as said:
            assert len([one async for one in said]) == 4


async def test_on_a_terminal_it_tells_how_far_it_is_and_in_a_pipe_only_what_was_said(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await simulate_run(bus)
    words = ("events", "replay", "--run", "mnist-1")
    fedbus = FedbusCli(tmp_path, FEDBUS_NATS_URL=nats.url, FEDBUS_FEDERATION=FED)
    piped = await fedbus(*words)
    assert (piped.code, piped.err, len(piped.out.splitlines())) == (0, "", 4)
    async with open_terminal(*words, environment=fedbus.environment) as shown:
        async with asyncio.timeout(60):
            assert await shown.process.wait() == 0
        await eventually(lambda: shown.raw.count("→") == 3)
    assert "replaying what was said at" in shown.raw
    assert "run test mnist-1 requested → recruiting" in shown.text, "no columns in 80 letters"


async def test_a_run_that_never_was_is_named(nats: NatsServer) -> None:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.create_streams()
        with pytest.raises(CliError, match="no run mnist-9 in federation test"):
            await resolve_window(bus, None, None, "mnist-9")
