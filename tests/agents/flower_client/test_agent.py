"""The Flower client, observed on the bus, with real training processes."""

import asyncio
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
from fedbus.contracts.model import BlobRef
from fedbus.contracts.round_messages import MessageContent, RoundMessage
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import ServerClosed
from fedbus.learning.flower import record_codec
from fedbus.stores.captured.store import CapturedData

RUN, CLIENT = f"{TASK}-1", "c1"
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
    blob: BlobRef | None = None,
    **records: ArrayRecord,
) -> None:
    """Send a Flower message of the run: evaluate, which needs no weights, or another with *records* or *blob*."""
    content = record_codec.encode(
        RecordDict({"config": ConfigRecord({"server-round": 1}), **records})
    ).to_bytes()
    message = RoundMessage(
        task=TASK,
        client=CLIENT,
        run=run,
        message_id=message_id,
        message_type=to,
        round=1,
        created_at=time.time(),
        ttl_s=60,
        content=MessageContent(blob=blob) if blob else MessageContent(inline=content),
    )
    await fed.publish(message, sender="flower-server")


async def send_server_closed(fed: FederationHarness, outcome: str = "finished", run: str = RUN) -> None:
    closed = {"task": TASK, "run": run, "outcome": outcome, "rounds": 1, "reason": "a test"}
    await fed.publish(ServerClosed.model_validate(closed), sender="server-manager")


async def train(fed: FederationHarness) -> psutil.Process:
    """Start a run, and return the training process after its first message."""
    await start_training(fed)
    await fed.wait_for_message(ClientJoined)
    await send_round_message(fed)
    await fed.wait_for_state("fl_client", "training")
    (process,) = child_processes("trainer")
    return process


# --- a run -------------------------------------------------------------------------------------------


async def test_a_client_trains_a_run_in_a_process_that_ends_with_it(
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


async def test_a_repeated_message_gets_one_reply(fed: FederationHarness, trainer: RunningAgent) -> None:
    await train(fed)
    await send_round_message(fed, "m1")
    await send_round_message(fed, "m2")
    await fed.wait_for_message(RoundReply, times=2)
    assert [reply.reply_to for reply in fed.messages_of(RoundReply)] == ["m1", "m2"]


async def test_a_new_server_ends_the_download_from_a_lost_one(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    content = record_codec.encode(RecordDict({"config": ConfigRecord({"server-round": 1})})).to_bytes()
    await train(fed)
    bus = await fed.connect_as("flower-server")
    async with await bus.blobs.offer(content) as offer:
        lost = offer.ref.model_copy(update={"holder": "server.flower-server_lost"})
        await send_round_message(fed, "from a lost server", blob=lost)
        await send_round_message(fed, "from the new server", blob=offer.ref)
        async with asyncio.timeout(PLAN.round_s / 2):  # the download itself would wait for `round_s`
            await fed.wait_for_message(RoundReply, times=2)
    assert [reply.reply_to for reply in fed.messages_of(RoundReply)] == ["m1", "from the new server"]


async def test_a_client_that_trains_publishes_heartbeats(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    async with fed.bus.subscribe_ephemeral(Heartbeat, task=TASK) as beats:
        await start_training(fed)
        assert await anext(beats) == Heartbeat(task=TASK, client=CLIENT, run=RUN)


async def test_an_app_that_raises_gives_an_error_reply_and_a_failed_span(
    fed: FederationHarness, trainer: RunningAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Path(fed.config.task.path) / "tiny" / "client_app.py"
    app.write_text(app.read_text().replace('MetricRecord({"num-examples": 1})', "1 / 0"))
    async with record_telemetry(monkeypatch) as telemetry:
        await train(fed)
        reply = await fed.wait_for_message(RoundReply)
        assert "ZeroDivisionError" in reply.error_reason
        assert child_processes("trainer")
        await fed.wait_until(lambda: any(span.name == "upload" for span in telemetry.spans))
    (training,) = [span for span in telemetry.spans if span.name in ("train", "evaluate")]
    assert training.attributes["error.type"] == "ZeroDivisionError"


async def test_a_training_counts_the_captured_rows_that_are_excluded(
    fed: FederationHarness, enrolled: None
) -> None:
    """One of four rows has a label outside the two classes, with which each training would fail."""
    tables = {"capture": {"holdout-share": 0.0}, "checks": {"classes": 2}}
    table = fed.config.task.table.model_validate({**fed.config.task.table.model_dump(), **tables})
    fed.config = replace(fed.config, task=fed.config.task.model_copy(update={"table": table}))
    device = fed.client_config(CLIENT)
    captured = CapturedData(device.captured_path())
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
        train_reply, evaluate_reply = fed.messages_of(RoundReply)
        assert (train_reply.error_reason, train_reply.left_out, evaluate_reply.left_out) == ("", 1, 0)
        with np.load(device.captured_path().with_name("captured.npz")) as data:
            assert data["labels"].tolist() == [0, 1]


# --- failures of one client ---------------------------------------------------------------------------


async def test_a_killed_trainer_is_reported_at_once(fed: FederationHarness, trainer: RunningAgent) -> None:
    (await train(fed)).send_signal(signal.SIGKILL)
    failed = await fed.wait_for_message(FailTrain)
    assert failed.trainer_lost
    assert failed.reason.startswith("the trainer was killed (SIGKILL")
    assert (await fed.wait_for_state("fl_client", "waiting")).source == "training"
    await start_training(fed, f"{TASK}-2")  # the client can train again
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


async def test_a_client_leaves_a_failed_run_with_its_reason(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    process = await train(fed)
    await send_server_closed(fed, "failed")
    assert (await fed.wait_for_message(FailTrain)).reason == "the run failed: a test"
    assert not process.is_running()


async def test_a_client_leaves_a_run_that_ended_without_it(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    await start_training(fed)
    await send_server_closed(fed)
    assert (await fed.wait_for_event("fl_client", "failed")).source == "pending"
    await fed.wait_for_message(FailTrain)


async def test_the_end_of_another_run_has_no_effect(fed: FederationHarness, trainer: RunningAgent) -> None:
    await train(fed)
    await send_server_closed(fed, run=f"{TASK}-7")
    await send_server_closed(fed)
    assert (await fed.wait_for_message(FinTrain)).run == RUN
    assert not fed.messages_of(FailTrain)


async def test_a_run_that_has_ended_is_not_started(fed: FederationHarness, trainer: RunningAgent) -> None:
    await send_server_closed(fed)
    await start_training(fed)
    assert (await fed.wait_for_message(FailTrain)).reason == "the run is over"
    assert fed.events_of("fl_client") == ["started"]


async def test_a_client_trains_one_run_at_a_time(fed: FederationHarness, trainer: RunningAgent) -> None:
    await start_training(fed)
    await start_training(fed)  # repeated by a restarted client manager
    await start_training(fed, f"{TASK}-2")
    failed = await fed.wait_for_message(FailTrain)
    assert (failed.run, failed.reason) == (f"{TASK}-2", f"this client is busy with {RUN}")
    assert len(child_processes("trainer")) <= 1


# --- stop and restart ------------------------------------------------------------------------------------


async def test_a_stopped_client_leaves_its_run_and_reports_it(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    process = await train(fed)
    await trainer.stop()
    assert (await fed.wait_for_message(FailTrain)).reason == "the client was stopped"
    assert not process.is_running()
    trainer.start()


async def test_a_restarted_client_reports_that_it_left_its_run(
    fed: FederationHarness, trainer: RunningAgent
) -> None:
    await train(fed)
    await trainer.restart()
    assert (await fed.wait_for_message(FailTrain)).reason == "the FL client was restarted"
    await start_training(fed, f"{TASK}-2")
    await fed.wait_for_message(ClientJoined, times=2)


async def test_a_restarted_client_reports_a_finished_run(fed: FederationHarness, enrolled: None) -> None:
    device = fed.client_config(CLIENT)
    bus = await fed.connect_as("flower-client", CLIENT)
    async with LifecycleStore.open(bus, device.open_outbox("flower-client")) as store:
        lifecycle = await store.load(FL_CLIENT, FlClientData(task=TASK, client=CLIENT, run=RUN))
        await lifecycle.create()
        for event in (FlClientEvent.CLIENT_START, FlClientEvent.ROUND_STARTED, FlClientEvent.RUN_FINISHED):
            await lifecycle.transition(event)
    async with fed.run_agent(lambda stop: flower_client(device, stop)):
        await fed.wait_for_message(FinTrain)
        await fed.wait_for_state("fl_client", "waiting")
    assert fed.last_transition("fl_client").event == "reported"


async def test_messages_of_an_earlier_run_are_dropped(fed: FederationHarness, trainer: RunningAgent) -> None:
    await send_round_message(fed, "of the run before", run=f"{TASK}-0")
    await train(fed)
    await fed.wait_for_message(RoundReply)
    assert [reply.reply_to for reply in fed.messages_of(RoundReply)] == ["m1"]
    await eventually(lambda: fed.last_transition("fl_client").target == "training")
