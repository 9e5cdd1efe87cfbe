"""`fedbus top`: what it folds, what it draws, and the whole of it on a real terminal and a real bus."""

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
from fedbus.app.terminal.top import follow_federation, load_overview
from fedbus.app.terminal.top_screen import SORT_BY_KEY, ScreenOptions, render_bar, render_screen
from fedbus.app.views.federation_status import SORT_KEYS, EventRate, FederationOverview
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import ClientData, ClientDeclined, ClientJoined, FailTrain, FlClientData
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.server import SERVER, ServerData, ServerEvent, StoreProblem

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
    overview: FederationOverview, *, width: int = 80, height: int = 24, look: ScreenOptions | None = None
) -> list[str]:
    file = StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
    console.print(
        render_screen(
            overview, look or ScreenOptions(), datetime.now(UTC), width=width, height=height, fed="dev"
        )
    )
    return [line.rstrip() for line in file.getvalue().splitlines()]


async def make_overview(bus: Bus) -> FederationOverview:
    overview = FederationOverview()
    await load_overview(bus, overview)
    return overview


def find_row(lines: list[str], client: str) -> str:
    return next(line for line in lines if line.startswith(f"{client} "))


# --- what is told ---------------------------------------------------------------------------------


async def test_a_screen_shows_servers_runs_and_clients(simulation: SimulatedFederation) -> None:
    await simulation.server()
    await simulation.clients(["c1", "c2", "c10"])
    await simulation.move(simulation.run(1, 2), "round_finished", "running", "running")
    lines = render_lines(await make_overview(simulation.bus))

    assert len(lines) == 24
    assert "3 clients · 0 train" in lines[0]
    assert lines[1].split()[:3] == ["mnist", "waiting", "v2"]
    assert lines[2].startswith("mnist-1    running")
    assert "2/4  loss 0.5760  accuracy 71.20%  3 clients" in lines[2]
    assert [line.split()[0] for line in lines[5:8]] == ["c1", "c2", "c10"]
    assert find_row(lines, "c1").split()[1:4] == ["serving", "waiting", "v2"]
    assert lines[-1].startswith("q quit")
    assert lines[-1].endswith("1–3 of 3")


async def test_a_server_says_what_is_wrong_with_its_model_repository_until_it_is_over(
    simulation: SimulatedFederation,
) -> None:
    async def shown() -> str:
        return render_lines(await make_overview(simulation.bus), width=120)[1]

    async with LifecycleStore.open(simulation.bus) as lives:
        server = await lives.of(SERVER, ServerData(task=TASK))
        await server.create()
        await server.transition(ServerEvent.MODEL_READY)
        await server.transition(
            ServerEvent.STORE_UNAVAILABLE, {"trouble": StoreProblem.UNAVAILABLE}, reason="no answer"
        )
        assert (await shown()).endswith("model repository unavailable: no answer")
        await server.transition(ServerEvent.MODEL_ROLLED_BACK, reason="by hand")
        assert (await shown()).endswith("model repository unavailable: by hand")
        await server.transition(ServerEvent.STORE_RECOVERED, {"trouble": None})
        assert "model repository" not in await shown()


async def test_each_client_says_why_it_does_not_train(simulation: SimulatedFederation) -> None:
    await simulation.clients(["c1", "c2", "c3", "c4"])
    about = {"task": TASK, "run": f"{TASK}-1"}
    await simulation.say(
        ClientDeclined(client="c1", reason="labelled is 3, and should be at least 64", **about)
    )
    await simulation.say(FailTrain(client="c2", reason="out of memory", **about))
    await simulation.say(ClientDeclined(client="c3", reason="the device is not charging", **about))
    simulation.passes(1)
    await simulation.say(ClientJoined(client="c3", **about))
    trains = FlClientData(task=TASK, client="c4", run=f"{TASK}-1")
    await simulation.move(trains, "round_started", "pending", "training")
    await simulation.move(simulation.run(1, 1), "round_finished", "running", "running")
    overview = await make_overview(simulation.bus)

    why = {one.client: overview.why(one) for one in overview.sorted("name")}
    assert why == {
        "c1": "declined mnist-1: labelled is 3, and should be at least 64",
        "c2": "failed in mnist-1: out of memory",
        "c3": "is not in mnist-1",
        "c4": "",
    }
    simulation.passes(1)
    await simulation.move(simulation.run(1, 4), "run_finished", "running", "finished")
    await simulation.move(simulation.run(2, 0), "recruiting_started", "requested", "recruiting")
    again = await make_overview(simulation.bus)
    assert next(again.why(one) for one in again.sorted("name")) == "has not joined mnist-2 yet"


async def test_a_client_that_gave_up_says_what_of(simulation: SimulatedFederation) -> None:
    facts = ClientData(task=TASK, client="c1")
    await simulation.move(facts, "bootstrap_failed", "s0", "terminated", reason="no model in 60 s")
    overview = await make_overview(simulation.bus)
    assert [overview.why(one) for one in overview.sorted("name")] == ["gave up: no model in 60 s"]


async def test_what_devices_tell_is_heard_and_sorted_by(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    await simulation.clients(["c1", "c2", "c3"])
    overview, heard = FederationOverview(), asyncio.Event()
    async with AsyncExitStack() as devices, follow_federation(simulation.bus, overview, heard.set):
        for client, cpu, heat in (("c1", 0.1, 40.0), ("c2", 0.95, None)):
            who = Identity(DEV, "device-monitor", client)
            device = await devices.enter_async_context(Bus.connect(nats.url, who))
            report = DeviceReport(task=TASK, client=client, cpu=cpu, memory=0.5, disk=0, temperature_c=heat)
            await device.publish(report)
        await eventually(lambda: len(overview.devices) == 2)
    assert (await make_overview(simulation.bus)).devices.keys() == {"c1", "c2"}, "and of who comes later"
    lines = render_lines(overview, width=140, look=ScreenOptions(sort="cpu"))

    assert [one.client for one in overview.sorted("cpu")] == ["c2", "c1", "c3"]
    assert next(one.client for one in overview.sorted("heat")) == "c1"
    assert "95%  50%     –" in find_row(lines, "c2")
    assert "10%  50%   40°" in find_row(lines, "c1")
    assert find_row(lines, "c3").count("–") >= 3
    assert heard.is_set()


async def test_hostile_words_stay_in_their_cell(simulation: SimulatedFederation) -> None:
    await simulation.clients(["c1"])
    reason = "\x1b]0;owned\x07\x1b[2J[red]no[/red]\nc9 is fine"
    await simulation.say(ClientDeclined(task=TASK, run=f"{TASK}-1", client="c1", reason=reason))
    lines = render_lines(await make_overview(simulation.bus), width=200)

    assert len(lines) == 24
    assert "\x1b" not in "".join(lines)
    assert "\x07" not in "".join(lines)
    assert "[red]no[/red] c9 is fine" in find_row(lines, "c1")


# --- what is drawn ---------------------------------------------------------------------------------


async def test_of_a_thousand_clients_only_what_is_seen_is_drawn(simulation: SimulatedFederation) -> None:
    await simulation.clients([f"c{number}" for number in range(1000)])
    overview, look = await make_overview(simulation.bus), ScreenOptions(first=10**6)
    lines = render_lines(overview, look=look)

    assert len(lines) == 24
    assert lines[-1].endswith("981–1000 of 1000")
    assert lines[-2].startswith("c999 ")
    assert look.first == 980


def test_a_screen_without_anybody_says_so() -> None:
    lines = render_lines(FederationOverview(), height=12)
    assert len(lines) == 12
    assert lines[-1].endswith("no clients yet")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
async def test_neither_the_headline_nor_the_keys_are_cut(simulation: SimulatedFederation, width: int) -> None:
    await simulation.clients(["c1", "c2"])
    overview = await make_overview(simulation.bus)
    lines = render_lines(overview, width=width, look=ScreenOptions(bus_is_there=False))
    assert "the bus is away" in lines[0]
    assert "…" not in lines[0] + lines[-1]
    assert lines[-1].startswith("q quit")
    assert lines[-1].endswith("1–2 of 2")


def test_every_key_sorts_by_something_and_so_does_the_option() -> None:
    assert set(SORT_BY_KEY.values()) == set(SORT_KEYS) == {str(one) for one in Sort}


def test_keys_come_one_by_one_with_names() -> None:
    assert parse_keys("c\x1b[Bq\x1b[6~\x1b[1;5A") == ["c", "down", "q", "page down", "\x1b[1;5A"]


def test_a_bar_is_seen_without_colours() -> None:
    assert [render_bar(done, 4, 8).plain for done in (0, 3, 9)] == ["╌" * 8, "━" * 6 + "╌" * 2, "━" * 8]


def test_the_rate_forgets_what_is_long_ago() -> None:
    rate = EventRate(over_s=10)
    for at in range(100, 120):
        rate.count(at)
        rate.count(at + 0.5)
    assert rate.per_s(119.9) == pytest.approx(2, abs=0.3)
    assert rate.per_s(500) == 0


# --- the command ---------------------------------------------------------------------------------------


async def test_piped_it_is_told_once_and_whole(simulation: SimulatedFederation, fedbus: FedbusCli) -> None:
    await simulation.server()
    await simulation.clients([f"c{number}" for number in range(40)])
    said = await fedbus("top")
    facts = (await fedbus("top", "--json")).facts

    assert said.code == 0
    assert "\x1b" not in said.out
    assert len([line for line in said.out.splitlines() if line.startswith("c")]) == 41
    assert said.err == "no run yet\n"
    assert [one["client"] for one in facts][-1] == "c39"
    assert facts[0]["why_not"] == "no run is under way"
    assert facts[0]["device"] is None


async def test_on_a_terminal_it_follows_sorts_resizes_and_quits(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    await simulation.server()
    await simulation.clients(["c1", "c2"])
    async with open_terminal("top", environment=fedbus.environment) as shown:
        await eventually(lambda: "1–2 of 2" in shown.text)
        assert len(shown.lines) == 24
        simulation.clock = datetime.now(UTC) + timedelta(seconds=1)
        await simulation.move(simulation.run(1, 3), "round_finished", "running", "running")
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
