"""`fedbus run watch`: rounds as a bar, and the clients that have answered."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support import NatsServer, eventually
from support.cli import FedbusCli
from support.simulated_federation import TASK, SimulatedFederation
from support.terminal import open_terminal

from fedbus.app.terminal.run_progress import describe_round
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.client import RoundReply
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.round_messages import MessageContent, RoundMessage
from fedbus.contracts.run import RunPlan

DEV = FederationId("dev")
RUN = f"{TASK}-1"


@pytest.fixture
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(DEV, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus, clock=datetime.now(UTC))


@pytest.fixture
def fedbus(nats: NatsServer, tmp_path: Path) -> FedbusCli:
    return FedbusCli(tmp_path / "home", FEDBUS_NATS_URL=nats.url)


async def send_round_message(simulation: SimulatedFederation, client: str, kind: str = "train") -> None:
    about: dict[str, Any] = {"task": TASK, "run": RUN, "client": client, "round": 2}
    about |= {"message_id": f"{kind}-{client}", "message_type": kind, "created_at": 0, "ttl_s": 60}
    await simulation.publish(RoundMessage(content=MessageContent(inline=b""), **about))


async def send_round_reply(simulation: SimulatedFederation, client: str) -> None:
    about: dict[str, Any] = {"task": TASK, "run": RUN, "client": client, "round": 2}
    about |= {"message_id": f"re-{client}", "reply_to": f"train-{client}", "created_at": 0, "ttl_s": 60}
    await simulation.publish(RoundReply(**about))


async def test_a_terminal_shows_the_answers_and_the_end_of_a_run(
    simulation: SimulatedFederation, fedbus: FedbusCli
) -> None:
    await simulation.transition(
        simulation.make_run_facts(1, 0),
        "started",
        "",
        "requested",
        waits_for="the server manager to open the run",
    )
    async with open_terminal("run", "watch", RUN, environment=fedbus.environment, columns=100) as shown:
        await eventually(lambda: "waits for the server manager" in shown.raw)
        await simulation.transition(simulation.make_run_facts(1, 1), "round_finished", "running", "running")
        await eventually(lambda: "round 1  loss 0.7200  accuracy 64.00%  6.50 s  3 clients" in shown.raw)
        for client in ("c1", "c2", "c3"):
            await send_round_message(simulation, client)
        await send_round_reply(simulation, "c1")
        await eventually(lambda: "round 2 of 4  train: 1 of 3 clients answered, not c2, c3" in shown.raw)
        await send_round_message(simulation, "c1", "evaluate")
        await eventually(lambda: "evaluate: 0 of 1 client answered" in shown.raw)
        await simulation.transition(
            simulation.make_run_facts(1, 4), "run_finished", "running", "finished", reason="no worse than v2"
        )
        async with asyncio.timeout(20):
            assert await shown.process.wait() == 0
        await eventually(lambda: "no worse than v2" in shown.raw)


async def test_a_pipe_gets_lines_and_no_bar(simulation: SimulatedFederation, fedbus: FedbusCli) -> None:
    await simulation.transition(simulation.make_run_facts(1, 1), "round_finished", "running", "running")
    await send_round_message(simulation, "c1")
    await simulation.transition(simulation.make_run_facts(1, 4), "run_finished", "running", "finished")
    result = await fedbus("run", "watch", RUN)

    assert result.code == 0
    assert len(result.out.splitlines()) == 2
    assert "━" not in result.out
    assert "\x1b" not in result.out


@pytest.mark.parametrize(
    ("plan", "done", "is_finished", "total"),
    [
        ({"rounds": 5}, 2, False, 5),
        ({"rounds": 5}, 2, True, 5),
        ({"app_rounds": 5}, 2, False, 5),
        ({"app_rounds": 5}, 6, False, 0),
        ({"app_rounds": 5}, 2, True, 2),
        ({}, 2, False, 0),
    ],
    ids=["planned", "ended early", "declared", "exceeded", "finished with fewer", "unknown"],
)
def test_the_number_of_rounds_is_shown_as_far_as_it_is_known(
    plan: dict[str, int], done: int, is_finished: bool, total: int
) -> None:
    assert RunPlan(**plan).total_rounds_after(done, is_finished=is_finished) == total


def test_a_round_without_a_total_has_its_number() -> None:
    assert describe_round(1, 3) == "round 2 of 3"
    assert describe_round(3, 3) == "round 3 of 3"
    assert describe_round(1, 0) == "round 2"
    assert describe_round(2, 0, is_final=True) == "round 2"
