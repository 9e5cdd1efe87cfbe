"""`fedbus run curve`: the rounds of all runs as a chart, as tables and as a file."""

import csv
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer
from support.cli import FedbusCli
from support.simulated_federation import TASK, SimulatedFederation

from fedbus.app.terminal.chart import render_chart
from fedbus.app.views.learning_curve import TIME_PARTS
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.identifiers import FederationId

DEV = FederationId("dev")


@pytest.fixture
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(DEV, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus)


@pytest.fixture
def fedbus(nats: NatsServer, tmp_path: Path) -> FedbusCli:
    return FedbusCli(tmp_path / "home", FEDBUS_NATS_URL=nats.url)


async def simulate_two_runs(simulation: SimulatedFederation) -> None:
    """Simulate two runs of four rounds; in the last round c1 trains 3 s of 5 s and waits 2 s for c2."""
    await simulation.create_server()
    await simulation.transition(simulation.make_run_facts(1, 4), "run_finished", "running", "finished")
    second = simulation.make_run_facts(2, 4, loss=0.4, requested_at=simulation.clock)
    last = second.rounds[-1].model_copy(
        update={
            "train_s": {"c1": 3.0, "c2": 7.0},
            "transfer_s": {"c1": 2.0, "c2": 0.0},
            "wait_s": {"c1": 2.0, "c2": 0.0},
            "contributions": {"c1": 0.25},
            "figures": {"c1": {"train_loss": 0.5, "eval_loss": 0.625}, "c2": {"train_loss": 0.75}},
        }
    )
    third = second.rounds[-2].model_copy(update={"figures": {"c2": {"train_loss": 1.0}}})
    second = second.model_copy(update={"rounds": (*second.rounds[:-2], third, last)})
    await simulation.transition(second, "round_finished", "running", "running")
    await simulation.transition(second, "run_finished", "running", "finished")


async def test_each_run_continues_the_curve_of_the_run_before(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    await simulate_two_runs(simulation)
    facts = (await fedbus("run", "curve", "--json")).facts

    assert [(one["run"], one["round"], one["step"]) for one in facts["rounds"]] == [
        *((f"{TASK}-1", number, number) for number in range(5)),
        *((f"{TASK}-2", number, 4 + number) for number in range(5)),
    ]
    assert [one["loss"] for one in facts["rounds"]][4:6] == [pytest.approx(0.36864), 0.4]


async def test_the_time_of_a_round_is_split_by_client(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    await simulate_two_runs(simulation)
    facts = (await fedbus("run", "curve", "--json", "--last", "1")).facts

    last = facts["rounds"][-1]["clients"]
    assert {client: [one.get(part) for part in TIME_PARTS] for client, one in last.items()} == {
        "c1": [3.0, 2.0, 2.0],
        "c2": [7.0, 0.0, 0.0],
        "c3": [None] * 3,
    }
    assert {one["client"]: one["wait_s"] for one in facts["clients"]} == {"c1": 2.0, "c2": 0.0, "c3": None}


async def test_the_metrics_of_each_client_are_shown(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    await simulate_two_runs(simulation)
    facts = (await fedbus("run", "curve", "--json")).facts
    lines = (await fedbus("run", "curve")).out.splitlines()

    assert facts["rounds"][-1]["clients"]["c1"]["eval_loss"] == 0.625
    assert {one["client"]: one["loss"] for one in facts["clients"]} == {
        "c1": [0.625],
        "c2": [1.0, 0.75],
        "c3": [],
    }
    heading = next(at for at, line in enumerate(lines) if line.startswith("client") and "loss" in line)
    assert lines[heading].split() == ["client", "loss", "accuracy", "reliability", "contribution"]
    assert [line.split() for line in lines[heading + 1 : heading + 4]] == [
        ["c2", "1", "→", "0.75", "–", "0.9", "–"],
        ["c1", "0.625", "→", "0.625", "–", "0.9", "0.25"],
        ["c3", "–", "–", "0.9", "–"],
    ]


async def test_the_chart_fits_80_columns(simulation: SimulatedFederation, fedbus: FedbusCli) -> None:
    await simulate_two_runs(simulation)
    result = await fedbus("run", "curve")
    lines = result.out.splitlines()

    assert result.code == 0
    assert lines[0] == "loss of mnist: 0.9000 → 0.1638"
    assert "accuracy of mnist: 0.5500 → 0.9181" in lines
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("c1")).split()[3:6] == ["3", "2", "2"]
    assert next(line for line in lines if line.startswith("       run")).split() == ["run", "1", "2"]


async def test_the_rounds_are_written_as_csv_one_per_line(
    simulation: SimulatedFederation, fedbus: FedbusCli, tmp_path: Path
) -> None:
    await simulate_two_runs(simulation)
    path = tmp_path / "curve.csv"
    result = await fedbus("run", "curve", "--csv", str(path))
    rows = list(csv.DictReader(path.read_text().splitlines()))

    assert result.err == f"wrote 10 rounds to {path}\n"
    assert (rows[-1]["run"], rows[-1]["step"], rows[-1]["train_s"]) == (f"{TASK}-2", "8", "5.0")
    assert rows[0]["train_s"] == ""
    assert (await fedbus("run", "curve", "--csv", str(tmp_path / "no" / "where"))).code == 6


async def test_without_a_round_the_command_names_the_next_step(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    await simulation.create_server()
    result = await fedbus("run", "curve")
    assert (result.code, result.out) == (0, "")
    assert result.err == "no finished rounds of task mnist. Start a run: fedbus run start\n"


def test_a_falling_curve_goes_from_top_left_to_bottom_right() -> None:
    lines = render_chart([(0, 1.0), (1, 0.5), (2, 0.2)], width=31, height=4, marks={0: "1", 2: "2"})
    assert len(lines) == 5
    assert [lines[0].split()[0], lines[3].split()[0]] == ["1", "0.2"]
    assert lines[0][11] != "⠀"
    assert len(lines[3]) == 31
    assert lines[4].split() == ["1", "2"]


@pytest.mark.parametrize("points", [[], [(0, float("nan"))]])
def test_no_points_give_no_lines(points: list[tuple[float, float]]) -> None:
    assert render_chart(points, width=40, height=4) == []


def test_one_point_and_a_flat_line_are_drawn() -> None:
    assert len(render_chart([(3, 0.5)], width=20, height=3)) == 3
    assert len(render_chart([(0, 0.5), (9, 0.5)], width=20, height=3)) == 3
