"""What takes its time is seen to go on: the first start of everything, and what is verified or written."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from io import StringIO

import pytest
from rich.console import Console
from support import NatsServer, eventually
from support.simulated_federation import TASK, SimulatedFederation

from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.app.terminal.startup_progress import StartupProgress, wait_until_serving
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.client import ClientData
from fedbus.contracts.identifiers import FederationId

DEV = FederationId("dev")


@pytest.fixture
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(DEV, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus, clock=datetime.now(UTC))


async def test_piped_each_arrival_is_a_line_and_the_last_says_that_all_serve(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    console = Console(file=StringIO(), width=80)
    arrivals = StartupProgress([TASK], ["c1", "c2"])

    def lines() -> list[str]:
        return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]

    waiting = asyncio.create_task(
        wait_until_serving(nats.url, DEV, arrivals, console, began=simulation.clock)
    )
    await eventually(lambda: lines() == ["waiting for the server of mnist to have a first model"])
    await simulation.create_server(version=1)
    await eventually(lambda: lines()[-1] == "0 of 2 clients serve; waiting for c1, c2")
    await simulation.create_clients(["c2"], version=1)
    await eventually(lambda: lines()[-1] == "1 of 2 clients serve; waiting for c1")
    facts = ClientData(task=TASK, client="c1")
    await simulation.transition(facts, "bootstrap_failed", "s0", "terminated", reason="no model in 60 s")
    await eventually(
        lambda: lines()[-1].endswith("c1 could not begin, and is started again: no model in 60 s")
    )
    await simulation.create_clients(["c1"], version=1)
    async with asyncio.timeout(20):
        await waiting
    assert lines()[-1].startswith("2 of 2 clients serve, model v1, after ")


async def test_a_server_that_was_there_before_and_says_nothing_is_not_waited_for(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    await simulation.create_server(version=4)
    console = Console(file=StringIO(), width=80)
    async with asyncio.timeout(20):
        began = datetime.now(UTC)
        await wait_until_serving(nats.url, DEV, StartupProgress([TASK], []), console, began=began)
    assert console.file.getvalue().startswith("the server is there, after ")  # type: ignore[attr-defined]


def test_of_several_tasks_each_client_is_named_with_its_task() -> None:
    arrivals = StartupProgress(["mnist", "faces"], ["c1"])
    assert str(arrivals) == "waiting for the server of faces, mnist to have a first model"


@pytest.mark.parametrize("total", [None, 3])
def test_work_is_seen_on_a_terminal_and_silent_in_a_pipe(total: int | None) -> None:
    for is_terminal in (True, False):
        file = StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=80, color_system=None)
        with progress_bar("verifying", total=total, console=console) as step:
            step(1, "v[1]")
            step(1, "v[2]")
        assert ("verifying v[2]" in file.getvalue()) is is_terminal
        assert ("2/3" in file.getvalue()) is (is_terminal and total == 3)
