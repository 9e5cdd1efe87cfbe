"""The progress of a start and of long commands."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from io import StringIO

import pytest
from rich.console import Console
from support import NatsServer, eventually
from support.simulated_federation import TASK, SimulatedFederation, make_model_ref

from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.app.terminal.startup_progress import FirstModelNotBuilt, StartupProgress, wait_until_serving
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.client import ClientData
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.server import ServerData

DEV = FederationId("dev")


@pytest.fixture
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(DEV, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus, clock=datetime.now(UTC))


async def test_a_pipe_gets_a_line_for_each_change(simulation: SimulatedFederation, nats: NatsServer) -> None:
    output = StringIO()
    console = Console(file=output, width=80)
    progress = StartupProgress([TASK], ["c1", "c2"])

    def lines() -> list[str]:
        return output.getvalue().splitlines()

    waiting = asyncio.create_task(
        wait_until_serving(nats.url, DEV, progress, console, started_at=simulation.clock)
    )
    await eventually(lambda: lines() == ["waiting for the first model of mnist"])
    await simulation.create_server(version=1)
    await eventually(lambda: lines()[-1] == "0 of 2 clients serve; waiting for c1, c2")
    await simulation.create_clients(["c2"], version=1)
    await eventually(lambda: lines()[-1] == "1 of 2 clients serve; waiting for c1")
    facts = ClientData(task=TASK, client="c1")
    await simulation.transition(facts, "bootstrap_failed", "s0", "terminated", reason="no model in 60 s")
    await eventually(lambda: lines()[-1].endswith("c1 did not start and is restarted: no model in 60 s"))
    await simulation.create_clients(["c1"], version=1)
    async with asyncio.timeout(20):
        await waiting
    assert lines()[-1].startswith("2 of 2 clients serve, model v1, after ")


async def test_a_running_server_is_not_waited_for(simulation: SimulatedFederation, nats: NatsServer) -> None:
    await simulation.create_server(version=4)
    output = StringIO()
    console = Console(file=output, width=80)
    async with asyncio.timeout(20):
        started_at = datetime.now(UTC)
        await wait_until_serving(nats.url, DEV, StartupProgress([TASK], []), console, started_at=started_at)
    assert output.getvalue().startswith("the server has started, after ")


def test_the_servers_of_several_tasks_are_named() -> None:
    progress = StartupProgress(["mnist", "faces"], ["c1"])
    assert str(progress) == "waiting for the first model of faces, mnist"


@pytest.mark.parametrize("total", [None, 3])
def test_a_terminal_shows_a_bar_and_a_pipe_nothing(total: int | None) -> None:
    for is_terminal in (True, False):
        file = StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=80, color_system=None)
        with progress_bar("verifying", total=total, console=console) as advance:
            advance(1, "v[1]")
            advance(1, "v[2]")
        assert ("verifying v[2]" in file.getvalue()) is is_terminal
        assert ("2/3" in file.getvalue()) is (is_terminal and total == 3)


async def test_a_first_model_that_fails_ends_the_start(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    """A failure from before the start does not count."""
    reason = "app:weights returned an object of type str"
    facts = ServerData(task=TASK)
    await simulation.transition(facts, "model_not_built", "model_init", "model_init", reason="an old reason")
    output = StringIO()
    console, started_at = Console(file=output, width=80), datetime.now(UTC)
    progress = StartupProgress([TASK], [])
    waiting = asyncio.create_task(wait_until_serving(nats.url, DEV, progress, console, started_at=started_at))
    await eventually(lambda: "an old reason" in output.getvalue())
    simulation.clock = datetime.now(UTC)
    await simulation.transition(facts, "model_not_built", "model_init", "model_init", reason=reason)
    with pytest.raises(FirstModelNotBuilt, match=f"task mnist has no first model: {reason}"):
        async with asyncio.timeout(20):
            await waiting


async def test_a_client_that_does_not_serve_is_ready(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    await simulation.create_server(version=1)
    reason = "version 1 is not served: it is empty"
    facts = ClientData(task=TASK, client="c1", model=make_model_ref(1), not_served=reason)
    output = StringIO()
    console, started_at = Console(file=output, width=200), datetime.now(UTC)
    progress = StartupProgress([TASK], ["c1"])
    waiting = asyncio.create_task(wait_until_serving(nats.url, DEV, progress, console, started_at=started_at))
    simulation.clock = datetime.now(UTC)
    await simulation.transition(facts, "model_not_served", "pending_application", "serving", reason=reason)
    async with asyncio.timeout(20):
        await waiting
    assert f"1 of 1 clients are ready, model v1; {reason}, after " in output.getvalue()


async def test_with_several_tasks_the_reason_names_client_and_task(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    reason = "version 1 is not served: it is empty"
    for task in (TASK, "faces"):
        server = ServerData(task=task, model=make_model_ref(1), term=1)
        await simulation.transition(server, "model_ready", "model_init", "waiting")
    output = StringIO()
    console, started_at = Console(file=output, width=200), datetime.now(UTC)
    progress = StartupProgress([TASK, "faces"], ["c1"])
    waiting = asyncio.create_task(wait_until_serving(nats.url, DEV, progress, console, started_at=started_at))
    simulation.clock = datetime.now(UTC)
    for task, not_served in ((TASK, reason), ("faces", "")):
        client = ClientData(task=task, client="c1", model=make_model_ref(1), not_served=not_served)
        await simulation.transition(client, "infer_ready", "pending_application", "serving")
    async with asyncio.timeout(20):
        await waiting
    assert f"2 of 2 clients are ready; c1 in mnist: {reason}, after " in output.getvalue()
