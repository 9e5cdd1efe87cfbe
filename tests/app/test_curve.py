"""`fedbus run curve`: rounds joined over all runs, drawn, counted and written."""

import csv
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer
from support.command_line import Fedbus
from support.told import TASK, Told

from fedbus.app.chart import chart
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.client import RoundReply
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.server import Content, RoundMessage

DEV = FederationId("dev")


@pytest.fixture
async def told(nats: NatsServer) -> AsyncIterator[Told]:
    async with Bus.connect(nats.url, Identity(DEV, "test")) as bus:
        await bus.make_streams()
        yield Told(bus)


@pytest.fixture
def fedbus(nats: NatsServer, tmp_path: Path) -> Fedbus:
    return Fedbus(tmp_path / "home", FEDBUS_NATS_URL=nats.url)


async def two_runs(told: Told) -> None:
    """Of four rounds each; in the last, c1 trains 3 s of 5 s and waits 2 s for c2."""
    await told.server()
    await told.move(told.run(1, 4), "run_finished", "running", "finished")
    second = told.run(2, 4, loss=0.4, requested_at=told.clock)
    for client in ("c1", "c2"):
        message = {"task": TASK, "client": client, "run": second.run, "round": 4, "message_id": client}
        asks = RoundMessage.model_validate(
            message | {"message_type": "train", "created_at": 0, "ttl_s": 60, "content": Content(inline=b"")}
        )
        await told.say(asks)
    for client, train_s, takes_s in (("c1", 3.0, 5), ("c2", 7.0, 2)):
        told.passes(takes_s)
        reply = {"task": TASK, "client": client, "run": second.run, "round": 4, "reply_to": client}
        await told.say(
            RoundReply.model_validate(
                reply | {"message_id": f"re-{client}", "created_at": 0, "ttl_s": 60, "train_s": train_s}
            )
        )
    await told.move(second, "round_finished", "running", "running")
    await told.move(second, "run_finished", "running", "finished")


async def test_each_run_goes_on_where_the_last_one_ended(told: Told, fedbus: Fedbus) -> None:
    await two_runs(told)
    facts = (await fedbus("run", "curve", "--json")).facts

    assert [(one["run"], one["round"], one["step"]) for one in facts["rounds"]] == [
        *((f"{TASK}-1", number, number) for number in range(5)),
        *((f"{TASK}-2", number, 4 + number) for number in range(5)),
    ]
    assert [one["loss"] for one in facts["rounds"]][4:6] == [pytest.approx(0.36864), 0.4]


async def test_the_time_of_a_round_is_split_by_client(told: Told, fedbus: Fedbus) -> None:
    await two_runs(told)
    facts = (await fedbus("run", "curve", "--json", "--last", "1")).facts

    assert facts["rounds"][-1]["clients"] == {
        "c1": {"train_s": 3.0, "transfer_s": 2.0, "wait_s": 2.0},
        "c2": {"train_s": 7.0, "transfer_s": 0.0, "wait_s": 0.0},
    }
    assert facts["rounds"][-2]["clients"] == {}
    assert {one["client"]: one["wait_s"] for one in facts["clients"]} == {"c1": 2.0, "c2": 0.0, "c3": None}


async def test_it_is_drawn_in_a_width_that_any_terminal_has(told: Told, fedbus: Fedbus) -> None:
    await two_runs(told)
    said = await fedbus("run", "curve")
    lines = said.out.splitlines()

    assert said.code == 0
    assert lines[0] == "loss of mnist: 0.9000 → 0.1638"
    assert "accuracy of mnist: 0.5500 → 0.9181" in lines
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("c1")).split()[3:6] == ["3", "2", "2"]
    assert next(line for line in lines if line.startswith("       run")).split() == ["run", "1", "2"]


async def test_the_rounds_are_written_a_line_each(told: Told, fedbus: Fedbus, tmp_path: Path) -> None:
    await two_runs(told)
    path = tmp_path / "curve.csv"
    said = await fedbus("run", "curve", "--csv", str(path))
    rows = list(csv.DictReader(path.read_text().splitlines()))

    assert said.err == f"10 rounds are in {path}\n"
    assert (rows[-1]["run"], rows[-1]["step"], rows[-1]["train_s"]) == (f"{TASK}-2", "8", "5.0")
    assert rows[0]["train_s"] == ""
    assert (await fedbus("run", "curve", "--csv", str(tmp_path / "no" / "where"))).code == 6


async def test_before_the_first_round_it_says_what_to_do(told: Told, fedbus: Fedbus) -> None:
    await told.server()
    said = await fedbus("run", "curve")
    assert (said.code, said.out) == (0, "")
    assert said.err == "no round of mnist is over yet. Start a run: fedbus run start\n"


def test_a_curve_falls_from_its_top_left_to_its_bottom_right() -> None:
    lines = chart([(0, 1.0), (1, 0.5), (2, 0.2)], width=31, height=4, marks={0: "1", 2: "2"})
    assert len(lines) == 5
    assert [lines[0].split()[0], lines[3].split()[0]] == ["1", "0.2"]
    assert lines[0][11] != "⠀"
    assert len(lines[3]) == 31
    assert lines[4].split() == ["1", "2"]


@pytest.mark.parametrize("points", [[], [(0, float("nan"))]])
def test_nothing_is_drawn_of_nothing(points: list[tuple[float, float]]) -> None:
    assert chart(points, width=40, height=4) == []


def test_one_point_and_a_flat_line_are_drawn_too() -> None:
    assert len(chart([(3, 0.5)], width=20, height=3)) == 3
    assert len(chart([(0, 0.5), (9, 0.5)], width=20, height=3)) == 3
