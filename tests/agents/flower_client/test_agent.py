"""The Flower client wrapper, heard from outside; the processes that train are real ones."""

import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from support import eventually
from support.federation import TASK, FederationHarness, RunningAgent
from support.processes import child_processes
from support.recorded_telemetry import record_telemetry

from fedbus.app.composition.agents import flower_client
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.catalogue import CLIENT_CONSUMERS
from fedbus.contracts.client import (
    FL_CLIENT,
    ClientJoined,
    ClientStart,
    FailTrain,
    FinTrain,
    FlClientData,
    FlClientEvent,
    Heartbeat,
    RoundReply,
)
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import MessageContent, RoundMessage, ServerClosed
from fedbus.learning.flower import record_codec
from fedbus.stores.captured.store import CapturedData

RUN, CLIENT = f"{TASK}-1", "c1"
THING = f"{CLIENT}.{TASK}"
PLAN = RunPlan(rounds=2, quorum=1, recruit_s=30, round_s=30)


@pytest.fixture
async def enrolled(fed: FederationHarness) -> None:
    for agent in CLIENT_CONSUMERS:
        await fed.bus.create_client_consumer(agent, task=TASK, client=CLIENT)


@pytest.fixture
async def trainer(fed: FederationHarness, enrolled: None) -> AsyncIterator[RunningAgent]:
    """A Flower client that waits for a run."""
    async with fed.run_agent(lambda stop: flower_client(fed.client_config(CLIENT), stop)) as agent:
        await fed.wait_for_state("fl_client", "waiting")
        yield agent


async def start_training(fed: FederationHarness, run: str = RUN, **config: object) -> None:
    plan = PLAN.model_copy(update={"config": config})
    await fed.publish(ClientStart(task=TASK, client=CLIENT, run=run, plan=plan), sender="client-manager")


async def send_round_message(
    fed: FederationHarness,
    message_id: str = "m1",
    run: str = RUN,
    *,
    to: str = "evaluate",
    **more: ArrayRecord,
) -> None:
    """A Flower message of the run: evaluate, which needs no weights, or another that is given *more*."""
    content = record_codec.encode(RecordDict({"config": ConfigRecord({"server-round": 1}), **more})).joined()
    message = RoundMessage(
        task=TASK,
        client=CLIENT,
        run=run,
        message_id=message_id,
        message_type=to,
        round=1,
        created_at=time.time(),
        ttl_s=60,
        content=MessageContent(inline=content),
    )
    await fed.publish(message, sender="flower-server")


async def send_server_closed(fed: FederationHarness, outcome: str = "finished", run: str = RUN) -> None:
    closed = {"task": TASK, "run": run, "outcome": outcome, "rounds": 1, "reason": "it was so"}
    await fed.publish(ServerClosed.model_validate(closed), sender="server-manager")


async def train(fed: FederationHarness) -> psutil.Process:
    """The process of a client that is in the middle of its run."""
    await start_training(fed)
    await fed.wait_for_message(ClientJoined)
    await send_round_message(fed)
    await fed.wait_for_state("fl_client", "training")
    (process,) = child_processes("trainer")
    return process


# --- a run -------------------------------------------------------------------------------------------


async def test_a_client_trains_a_run_in_a_process_that_goes_when_it_is_over(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    process = await train(fed)
    reply = await fed.wait_for_message(RoundReply)
    assert (reply.client, reply.reply_to, reply.round, reply.error_code) == (CLIENT, "m1", 1, None)
    assert (await fed.wait_for_message(ClientJoined)).code_version == fed.config.task.code_version
    await send_server_closed(fed)
    assert await fed.wait_for_message(FinTrain) == FinTrain(task=TASK, client=CLIENT, run=RUN, rounds=1)
    await fed.wait_for_state("fl_client", "waiting")
    assert not process.is_running()
    assert fed.events_of("fl_client") == [
        "started",
        "client_start",
        "round_started",
        "run_finished",
        "reported",
    ]


async def test_a_message_that_comes_twice_is_answered_once(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    await train(fed)
    await send_round_message(fed, "m1")
    await send_round_message(fed, "m2")
    await fed.wait_for_message(RoundReply, times=2)
    assert [reply.reply_to for reply in fed.messages_of(RoundReply)] == ["m1", "m2"]


async def test_a_client_that_trains_says_so_all_the_time(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    async with fed.bus.subscribe_ephemeral(Heartbeat, task=TASK) as beats:
        await start_training(fed)
        assert await anext(beats) == Heartbeat(task=TASK, client=CLIENT, run=RUN)


async def test_an_app_that_raises_is_an_answer_and_a_failed_training_and_the_process_goes_on(
    fed: FederationHarness, trainer: RunningAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Path(fed.config.task.path) / "tiny" / "client_app.py"
    app.write_text(app.read_text().replace('MetricRecord({"num-examples": 1})', "1 / 0"))
    async with record_telemetry(monkeypatch) as heard:
        await train(fed)
        reply = await fed.wait_for_message(RoundReply)
        assert "ZeroDivisionError" in reply.error_reason
        assert child_processes("trainer")
        await fed.wait_until(lambda: any(span.name == "upload" for span in heard.spans))
    (training,) = [span for span in heard.spans if span.name in ("train", "evaluate")]
    assert training.attributes["error.type"] == "ZeroDivisionError"


async def test_a_training_says_how_many_captured_rows_it_did_not_get(
    fed: FederationHarness, enrolled: None
) -> None:
    """Of four, one has a label that is none of the two classes: by it every training of the device would fail."""
    tables = {"capture": {"holdout-share": 0.0}, "checks": {"classes": 2}}
    table = fed.config.task.table.model_validate({**fed.config.task.table.model_dump(), **tables})
    fed.config = replace(fed.config, task=fed.config.task.model_copy(update={"table": table}))
    device = fed.client_config(CLIENT)
    captured = CapturedData(device.captured())
    for label in (0, 99, 1, None):
        captured.add(np.zeros(3, np.float32), np.int64(0), label, model_version=1)
    await captured.close()
    weights = ArrayRecord({"bias": Array(np.zeros(4, np.float32))})
    async with fed.run_agent(lambda stop: flower_client(device, stop)):
        await start_training(fed)
        await fed.wait_for_message(ClientJoined)
        await send_round_message(fed, "m1", to="train", arrays=weights)
        await send_round_message(fed, "m2")
        await fed.wait_for_message(RoundReply, times=2)
        trained, evaluated = fed.messages_of(RoundReply)
        assert (trained.error_reason, trained.left_out, evaluated.left_out) == ("", 1, 0)
        with np.load(device.captured().with_name("captured.npz")) as data:
            assert data["labels"].tolist() == [0, 1]


# --- failures are this client's alone -----------------------------------------------------------------


async def test_a_trainer_that_is_killed_is_told_of_at_once(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    (await train(fed)).send_signal(signal.SIGKILL)
    failed = await fed.wait_for_message(FailTrain)
    assert failed.trainer_lost
    assert failed.reason.startswith("the trainer was killed (SIGKILL")
    assert (await fed.wait_for_state("fl_client", "waiting")).source == "training"
    await start_training(fed, f"{TASK}-2")  # and may train again
    await fed.wait_for_message(ClientJoined, times=2)


async def test_an_app_that_cannot_be_loaded_fails_before_it_joins(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    app = Path(fed.config.task.path) / "tiny" / "client_app.py"
    app.write_text(app.read_text().replace("import os", "import not_there"))
    await start_training(fed)
    failed = await fed.wait_for_message(FailTrain)
    assert "not_there" in failed.reason
    assert (await fed.wait_for_event("fl_client", "failed")).source == "pending"
    assert not fed.messages_of(ClientJoined)


async def test_a_run_that_failed_is_left_with_the_reason(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    process = await train(fed)
    await send_server_closed(fed, "failed")
    assert (await fed.wait_for_message(FailTrain)).reason == "the run failed: it was so"
    assert not process.is_running()


async def test_a_run_that_ended_without_this_client_is_left_too(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    await start_training(fed)
    await send_server_closed(fed)
    assert (await fed.wait_for_event("fl_client", "failed")).source == "pending"
    await fed.wait_for_message(FailTrain)


async def test_the_end_of_another_run_changes_nothing(fed: FederationHarness, trainer: RunningAgent) -> None:
    await train(fed)
    await send_server_closed(fed, run=f"{TASK}-7")
    await send_server_closed(fed)
    assert (await fed.wait_for_message(FinTrain)).run == RUN
    assert not fed.messages_of(FailTrain)


async def test_a_run_that_was_over_before_it_began_here_is_not_begun(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    await send_server_closed(fed)
    await start_training(fed)
    assert (await fed.wait_for_message(FailTrain)).reason == "the run is over"
    assert fed.events_of("fl_client") == ["started"]


async def test_a_client_trains_one_run_at_a_time(fed: FederationHarness, trainer: RunningAgent) -> None:
    await start_training(fed)
    await start_training(fed)  # the client manager was restarted: it is the same run
    await start_training(fed, f"{TASK}-2")
    failed = await fed.wait_for_message(FailTrain)
    assert (failed.run, failed.reason) == (f"{TASK}-2", f"this client is busy with {RUN}")
    assert len(child_processes("trainer")) <= 1


# --- coming and going ------------------------------------------------------------------------------------


async def test_asked_to_stop_it_leaves_its_run_and_says_so(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    process = await train(fed)
    await trainer.stop()
    assert (await fed.wait_for_message(FailTrain)).reason == "the client was stopped"
    assert not process.is_running()
    trainer.start()


async def test_killed_and_back_it_says_that_it_is_out_of_its_run(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    await train(fed)
    await trainer.restart()
    assert (await fed.wait_for_message(FailTrain)).reason == "the FL client was restarted"
    await start_training(fed, f"{TASK}-2")
    await fed.wait_for_message(ClientJoined, times=2)


async def test_killed_between_the_end_and_the_report_it_reports(
    fed: FederationHarness, enrolled: None
) -> None:
    device = fed.client_config(CLIENT)
    bus = await fed.connect_as("flower-client", CLIENT)
    async with LifecycleStore.open(bus, device.outbox("flower-client")) as lives:
        life = await lives.of(FL_CLIENT, FlClientData(task=TASK, client=CLIENT, run=RUN))
        await life.create()
        for event in (FlClientEvent.CLIENT_START, FlClientEvent.ROUND_STARTED, FlClientEvent.RUN_FINISHED):
            await life.transition(event)
    async with fed.run_agent(lambda stop: flower_client(device, stop)):
        await fed.wait_for_message(FinTrain)
        await fed.wait_for_state("fl_client", "waiting")
    assert fed.last_transition("fl_client").event == "reported"


async def test_what_an_earlier_run_still_wanted_is_let_go(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    await send_round_message(fed, "of the run before", run=f"{TASK}-0")
    await train(fed)
    await fed.wait_for_message(RoundReply)
    assert [reply.reply_to for reply in fed.messages_of(RoundReply)] == ["m1"]
    await eventually(lambda: fed.last_transition("fl_client").target == "training")
