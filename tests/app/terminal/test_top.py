"""`fedbus top`: the screen, and the command on a real terminal and a real bus."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from support import NatsServer, eventually
from support.cli import FedbusCli
from support.simulated_federation import TASK, SimulatedFederation
from support.terminal import open_terminal

from fedbus.app.cli.commands.top import Sort
from fedbus.app.terminal.keyboard import parse_keys
from fedbus.app.terminal.top_screen import SORT_BY_KEY, ScreenOptions, render_bar, render_screen
from fedbus.app.views.federation_status import (
    SORT_KEYS,
    EventRate,
    follow_view,
    load_view,
    sort_clients,
)
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import ClientData, ClientDeclined, ClientJoined, FailTrain, FlClientData
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.server import SERVER, ServerData, ServerEvent, StoreProblem
from fedbus.domain.federation_view import FederationView

DEV = FederationId("dev")


@pytest.fixture
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(DEV, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus)


@pytest.fixture
def fedbus(nats: NatsServer, tmp_path: Path) -> FedbusCli:
    return FedbusCli(tmp_path / "home", FEDBUS_NATS_URL=nats.url)


def render_lines(
    view: FederationView, *, width: int = 80, height: int = 24, options: ScreenOptions | None = None
) -> list[str]:
    file = StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
    console.print(
        render_screen(
            view, options or ScreenOptions(), datetime.now(UTC), width=width, height=height, fed="dev"
        )
    )
    return [line.rstrip() for line in file.getvalue().splitlines()]


async def loaded_view(bus: Bus) -> FederationView:
    view = FederationView()
    await load_view(bus, view)
    return view


def find_row(lines: list[str], client: str) -> str:
    return next(line for line in lines if line.startswith(f"{client} "))


# --- what the bus holds ---------------------------------------------------------------------------------


async def test_a_screen_shows_servers_runs_and_clients(simulation: SimulatedFederation) -> None:
    await simulation.create_server()
    await simulation.create_clients(["c1", "c2", "c10"])
    await simulation.transition(simulation.make_run_facts(1, 2), "round_finished", "running", "running")
    lines = render_lines(await loaded_view(simulation.bus))

    assert len(lines) == 24
    assert "3 clients · 0 train" in lines[0]
    assert lines[1].split()[:3] == ["mnist", "waiting", "v2"]
    assert lines[2].startswith("mnist-1    running")
    assert "2/4  loss 0.5760  accuracy 71.20%  3 clients" in lines[2]
    assert [line.split()[0] for line in lines[5:8]] == ["c1", "c2", "c10"]
    assert find_row(lines, "c1").split()[1:4] == ["serving", "waiting", "v2"]
    assert lines[-1].startswith("q quit")
    assert lines[-1].endswith("1–3 of 3")


async def test_a_server_shows_a_store_problem_until_it_is_over(
    simulation: SimulatedFederation,
) -> None:
    async def server_line() -> str:
        return render_lines(await loaded_view(simulation.bus), width=120)[1]

    async with LifecycleStore.open(simulation.bus) as lifecycles:
        server = await lifecycles.load(SERVER, ServerData(task=TASK))
        await server.create()
        await server.transition(ServerEvent.MODEL_READY)
        await server.transition(
            ServerEvent.STORE_UNAVAILABLE, {"trouble": StoreProblem.UNAVAILABLE}, reason="no answer"
        )
        assert (await server_line()).endswith("model repository unavailable: no answer")
        await server.transition(ServerEvent.MODEL_ROLLED_BACK, reason="by hand")
        assert (await server_line()).endswith("model repository unavailable: by hand")
        await server.transition(ServerEvent.STORE_RECOVERED, {"trouble": None})
        assert "model repository" not in await server_line()


async def test_each_client_shows_why_it_does_not_train(simulation: SimulatedFederation) -> None:
    await simulation.create_clients(["c1", "c2", "c3", "c4"])
    about = {"task": TASK, "run": f"{TASK}-1"}
    await simulation.publish(
        ClientDeclined(client="c1", reason="labelled is 3, and should be at least 64", **about)
    )
    await simulation.publish(FailTrain(client="c2", reason="out of memory", **about))
    await simulation.publish(ClientDeclined(client="c3", reason="the device is not charging", **about))
    simulation.advance(1)
    await simulation.publish(ClientJoined(client="c3", **about))
    trains = FlClientData(task=TASK, client="c4", run=f"{TASK}-1")
    await simulation.transition(trains, "round_started", "pending", "training")
    await simulation.transition(simulation.make_run_facts(1, 1), "round_finished", "running", "running")
    view = await loaded_view(simulation.bus)

    why = {one.client: view.not_training_reason(one) for one in sort_clients(view, "name")}
    assert why == {
        "c1": "declined mnist-1: labelled is 3, and should be at least 64",
        "c2": "failed in mnist-1: out of memory",
        "c3": "is not in mnist-1",
        "c4": "",
    }
    simulation.advance(1)
    await simulation.transition(simulation.make_run_facts(1, 4), "run_finished", "running", "finished")
    await simulation.transition(
        simulation.make_run_facts(2, 0), "recruiting_started", "requested", "recruiting"
    )
    again = await loaded_view(simulation.bus)
    assert (
        next(again.not_training_reason(one) for one in sort_clients(again, "name"))
        == "has not joined mnist-2 yet"
    )


async def test_a_client_that_gave_up_shows_the_reason(simulation: SimulatedFederation) -> None:
    facts = ClientData(task=TASK, client="c1")
    await simulation.transition(facts, "bootstrap_failed", "s0", "terminated", reason="no model in 60 s")
    view = await loaded_view(simulation.bus)
    assert [view.not_training_reason(one) for one in sort_clients(view, "name")] == [
        "gave up: no model in 60 s"
    ]


async def test_device_reports_are_shown_and_sorted_by(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    await simulation.create_clients(["c1", "c2", "c3"])
    view, changed = FederationView(), asyncio.Event()
    async with AsyncExitStack() as devices, follow_view(simulation.bus, view, changed.set):
        for client, cpu, heat in (("c1", 0.1, 40.0), ("c2", 0.95, None)):
            identity = Identity(DEV, "device-monitor", client)
            device = await devices.enter_async_context(Bus.connect(nats.url, identity))
            report = DeviceReport(task=TASK, client=client, cpu=cpu, memory=0.5, disk=0, temperature_c=heat)
            await device.publish(report)
        await eventually(lambda: len(view.presence.devices) == 2)
    assert (await loaded_view(simulation.bus)).presence.devices.keys() == {"c1", "c2"}, (
        "a view loaded later has them too"
    )
    lines = render_lines(view, width=140, options=ScreenOptions(sort="cpu"))

    assert [one.client for one in sort_clients(view, "cpu")] == ["c2", "c1", "c3"]
    assert next(one.client for one in sort_clients(view, "heat")) == "c1"
    assert "95%  50%     –" in find_row(lines, "c2")
    assert "10%  50%   40°" in find_row(lines, "c1")
    assert find_row(lines, "c3").count("–") >= 3
    assert changed.is_set()


async def test_hostile_text_stays_in_its_cell(simulation: SimulatedFederation) -> None:
    await simulation.create_clients(["c1"])
    reason = "\x1b]0;owned\x07\x1b[2J[red]no[/red]\nc9 is fine"
    await simulation.publish(ClientDeclined(task=TASK, run=f"{TASK}-1", client="c1", reason=reason))
    lines = render_lines(await loaded_view(simulation.bus), width=200)

    assert len(lines) == 24
    assert "\x1b" not in "".join(lines)
    assert "\x07" not in "".join(lines)
    assert "[red]no[/red] c9 is fine" in find_row(lines, "c1")


# --- the screen ---------------------------------------------------------------------------------


async def test_of_a_thousand_clients_the_visible_ones_are_drawn(simulation: SimulatedFederation) -> None:
    await simulation.create_clients([f"c{number}" for number in range(1000)])
    view, options = await loaded_view(simulation.bus), ScreenOptions(first=10**6)
    lines = render_lines(view, options=options)

    assert len(lines) == 24
    assert lines[-1].endswith("981–1000 of 1000")
    assert lines[-2].startswith("c999 ")
    assert options.first == 980


def test_a_screen_without_clients_says_so() -> None:
    lines = render_lines(FederationView(), height=12)
    assert len(lines) == 12
    assert lines[-1].endswith("no clients yet")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
async def test_neither_headline_nor_keys_are_cut(simulation: SimulatedFederation, width: int) -> None:
    await simulation.create_clients(["c1", "c2"])
    view = await loaded_view(simulation.bus)
    lines = render_lines(view, width=width, options=ScreenOptions(is_connected=False))
    assert "disconnected" in lines[0]
    assert "…" not in lines[0] + lines[-1]
    assert lines[-1].startswith("q quit")
    assert lines[-1].endswith("1–2 of 2")


def test_keys_and_option_have_the_same_sort_orders() -> None:
    assert set(SORT_BY_KEY.values()) == set(SORT_KEYS) == {str(one) for one in Sort}


def test_keys_are_split_and_named() -> None:
    assert parse_keys("c\x1b[Bq\x1b[6~\x1b[1;5A") == ["c", "down", "q", "page down", "\x1b[1;5A"]


def test_a_bar_is_readable_without_colours() -> None:
    assert [render_bar(done, 4, 8).plain for done in (0, 3, 9)] == ["╌" * 8, "━" * 6 + "╌" * 2, "━" * 8]


def test_the_rate_forgets_old_events() -> None:
    rate = EventRate(window_s=10)
    for at in range(100, 120):
        rate.count(at)
        rate.count(at + 0.5)
    assert rate.per_s(119.9) == pytest.approx(2, abs=0.3)
    assert rate.per_s(500) == 0


# --- the command ---------------------------------------------------------------------------------------


async def test_a_pipe_gets_one_whole_snapshot(simulation: SimulatedFederation, fedbus: FedbusCli) -> None:
    await simulation.create_server()
    await simulation.create_clients([f"c{number}" for number in range(40)])
    result = await fedbus("top")
    facts = (await fedbus("top", "--json")).facts

    assert result.code == 0
    assert "\x1b" not in result.out
    assert len([line for line in result.out.splitlines() if line.startswith("c")]) == 41
    assert result.err == "no runs yet\n"
    assert [one["client"] for one in facts][-1] == "c39"
    assert facts[0]["why_not"] == "no run is in progress"
    assert facts[0]["device"] is None


async def test_on_a_terminal_it_follows_sorts_resizes_and_quits(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    await simulation.create_server()
    await simulation.create_clients(["c1", "c2"])
    async with open_terminal("top", environment=fedbus.environment) as shown:
        await eventually(lambda: "1–2 of 2" in shown.text)
        assert len(shown.lines) == 24
        simulation.clock = datetime.now(UTC) + timedelta(seconds=1)
        await simulation.transition(simulation.make_run_facts(1, 3), "round_finished", "running", "running")
        await eventually(lambda: "3/4  loss" in shown.text)
        shown.press("nr")
        await eventually(
            lambda: "client▲" in shown.text and shown.text.index("\nc2 ") < shown.text.index("\nc1 ")
        )
        shown.resize(140, 30)
        await eventually(lambda: len(shown.lines) == 30 and "predicts" in shown.text)
        shown.press("q")
        async with asyncio.timeout(20):
            assert await shown.process.wait() == 0
        await eventually(lambda: shown.raw.rstrip().endswith(("\x1b[?1049l", "\x1b[?25h")))
