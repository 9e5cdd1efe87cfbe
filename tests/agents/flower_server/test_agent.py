"""The Flower server, observed on the bus, with real child processes."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from support import eventually
from support.federation import TASK, FederationHarness, RunningAgent
from support.processes import child_processes
from support.recorded_telemetry import record_spans

from fedbus.agents.flower_server.agent import FlowerServer
from fedbus.app.composition.agents import flower_server
from fedbus.bus.errors import RequestRefused
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CheckCode
from fedbus.contracts.examples import MODEL, NOON
from fedbus.contracts.flower_server import (
    BeginTraining,
    FindServer,
    InitModel,
    RunFailed,
    ServerLost,
    ServerStarted,
    StartServer,
    StopServer,
)
from fedbus.contracts.message import RefusalKind
from fedbus.contracts.model import Artifact
from fedbus.contracts.round_messages import RoundMessage
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import SERVER, ServerData, ServerEvent
from fedbus.learning import weights
from fedbus.stores.models.open import open_model_store

RUN = f"{TASK}-1"
PLAN = RunPlan(rounds=2, quorum=1, recruit_s=30, round_s=30)
SERVER_DATA = ServerData(task=TASK, run=RUN, plan=PLAN, model=MODEL, recruit_until=NOON)


@pytest.fixture
async def model(fed: FederationHarness) -> Artifact:
    """The initial model, stored in the repository."""
    store = open_model_store(fed.config.store_url, TASK)
    await store.prepare()
    arrays = {"weight": np.zeros((4, 3), np.float32), "bias": np.zeros(4, np.float32)}
    artifact = weights.save(arrays, fed.config.home / "first.safetensors")
    await store.put(fed.config.home / "first.safetensors", artifact.sha256)
    return artifact


@pytest.fixture
async def agent(fed: FederationHarness) -> AsyncIterator[RunningAgent]:
    async with fed.run_agent(lambda stop: flower_server(fed.config, stop)) as agent:
        await eventually(lambda: is_answered(fed))
        yield agent


async def is_answered(fed: FederationHarness) -> bool:
    return await fed.is_answered(FindServer(task=TASK, run=RUN))


async def is_up(fed: FederationHarness, run: str = RUN) -> bool:
    found: bool = (await fed.bus.request(FindServer(task=TASK, run=run))).up
    return found


async def start_server(
    fed: FederationHarness, model: Artifact, run: str = RUN, first_round: int = 1
) -> psutil.Process:
    """Start the server of a run, wait for `server_started`, and return its process."""
    count = len(fed.messages_of(ServerStarted))
    await fed.bus.request(StartServer(task=TASK, run=run, plan=PLAN, artifact=model, first_round=first_round))
    await fed.wait_for_message(ServerStarted, times=count + 1)
    (process,) = child_processes("server")
    return process


# --- the initial model -------------------------------------------------------------------------


async def test_the_initial_model_is_built_in_a_process_and_stored(
    fed: FederationHarness, agent: RunningAgent
) -> None:
    store = open_model_store(fed.config.store_url, TASK)
    await store.prepare()
    reply = await fed.bus.request(InitModel(task=TASK), timeout_s=60)
    arrays = weights.load(await store.local_path(reply.artifact.sha256))
    assert {name: array.shape for name, array in arrays.items()} == {"weight": (4, 3), "bias": (4,)}
    assert await store.read_latest() is None  # an artifact, not yet a version
    assert not child_processes("init")


async def test_a_missing_model_builder_is_refused_in_one_line(fed: FederationHarness) -> None:
    table = fed.config.task.table.model_copy(update={"model": "tiny.samples:Nothing"})
    config = fed.config.process_config().model_copy(
        update={"task": fed.config.task.model_copy(update={"table": table})}
    )
    store = open_model_store(fed.config.store_url, TASK)
    await store.prepare()

    async def run(stop: asyncio.Event) -> None:
        async with fed.config.connect_bus("flower-server") as bus:
            await FlowerServer(bus, config, store, logs=fed.config.logs).run(stop)

    async with fed.run_agent(run):
        await eventually(lambda: is_answered(fed))
        with pytest.raises(RequestRefused, match=r"cannot build the initial model: .*Nothing") as refused:
            await fed.bus.request(InitModel(task=TASK), timeout_s=60)
    assert "\n" not in refused.value.reason


async def test_a_check_without_its_model_store_can_be_retried(
    fed: FederationHarness, agent: RunningAgent, model: Artifact
) -> None:
    version = fed.config.task.code_version
    check = CheckCode(task=TASK, code_version=version, like=model.sha256)
    models = fed.config.home / "models"
    unmounted = models.rename(models.with_name("unmounted"))
    with pytest.raises(RequestRefused, match="is not mounted") as refused:
        await fed.bus.request(check, timeout_s=60)
    assert refused.value.kind is RefusalKind.RETRYABLE
    unmounted.rename(models)
    assert (await fed.bus.request(check, timeout_s=60)).differs == ""
    with pytest.raises(RequestRefused, match="one version") as refused:
        await fed.bus.request(check.model_copy(update={"code_version": "b" * 40}), timeout_s=60)
    assert refused.value.kind is RefusalKind.CALLER


async def test_a_run_with_corrupt_weights_needs_an_operator(
    fed: FederationHarness, agent: RunningAgent, model: Artifact
) -> None:
    store = open_model_store(fed.config.store_url, TASK)
    await store.prepare()
    (await store.local_path(model.sha256)).write_bytes(b"\xff" * model.size_bytes)
    with pytest.raises(RequestRefused, match="is corrupt") as refused:
        await start_server(fed, model)
    assert refused.value.kind is RefusalKind.NEEDS_OPERATOR


# --- the server of a run -------------------------------------------------------------------------


async def test_a_server_is_up_from_its_start_to_its_stop(
    fed: FederationHarness, agent: RunningAgent, model: Artifact
) -> None:
    process = await start_server(fed, model)
    assert await is_up(fed)
    assert not await is_up(fed, f"{TASK}-2")
    await fed.bus.request(StopServer(task=TASK, run=RUN), timeout_s=15)
    assert not process.is_running()
    assert not await is_up(fed)
    assert not fed.messages_of(ServerLost)


async def test_a_killed_server_is_reported_and_can_be_replaced(
    fed: FederationHarness, agent: RunningAgent, model: Artifact
) -> None:
    (await start_server(fed, model)).send_signal(signal.SIGKILL)
    lost = await fed.wait_for_message(ServerLost)
    assert lost.run == RUN
    assert lost.reason.startswith("the Flower server was killed (SIGKILL")
    assert not await is_up(fed)
    await start_server(fed, model, first_round=2)
    assert await is_up(fed)


async def test_a_server_ended_by_a_signal_from_elsewhere_is_lost(
    fed: FederationHarness, agent: RunningAgent, model: Artifact
) -> None:
    (await start_server(fed, model)).send_signal(signal.SIGTERM)
    assert (await fed.wait_for_message(ServerLost)).reason.startswith("the Flower server ended with code 143")


async def test_a_new_run_ends_the_server_of_the_previous_run(
    fed: FederationHarness, agent: RunningAgent, model: Artifact
) -> None:
    first = await start_server(fed, model)
    second = await start_server(fed, model, run=f"{TASK}-2")
    assert (first.is_running(), second.is_running()) == (False, True)
    assert not fed.messages_of(ServerLost)


async def test_the_server_of_a_run_ends_with_the_agent(
    fed: FederationHarness, agent: RunningAgent, model: Artifact
) -> None:
    process = await start_server(fed, model)
    await agent.stop()
    assert not process.is_running()
    agent.start()
    await eventually(lambda: is_answered(fed))


async def test_a_restarted_agent_reports_the_server_that_ended_with_it(
    fed: FederationHarness,
) -> None:
    async with LifecycleStore.open(await fed.connect_as("server-manager")) as store:
        server = await store.load(SERVER, SERVER_DATA)
        await server.create()
        for event in (ServerEvent.MODEL_READY, ServerEvent.RUN_REQUESTED, ServerEvent.QUORUM_REACHED):
            await server.transition(event)
    async with fed.run_agent(lambda stop: flower_server(fed.config, stop)):
        assert (await fed.wait_for_message(ServerLost)).run == RUN


async def test_the_report_of_a_restarted_agent_is_in_the_trace_of_the_run(
    fed: FederationHarness,
) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with LifecycleStore.open(await fed.connect_as("server-manager")) as store:
        facts = SERVER_DATA.model_copy(update={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"})
        server = await store.load(SERVER, facts)
        await server.create()
        for event in (ServerEvent.MODEL_READY, ServerEvent.RUN_REQUESTED, ServerEvent.QUORUM_REACHED):
            await server.transition(event)
    with record_spans() as spans:
        async with fed.run_agent(lambda stop: flower_server(fed.config, stop)):
            await fed.wait_for_message(ServerLost)
    published = [span for span in spans.get_finished_spans() if span.name == "publish server_lost"]
    assert [f"{span.context.trace_id:032x}" for span in published if span.context] == [trace_id]


async def test_a_missing_server_is_reported_on_request(fed: FederationHarness, agent: RunningAgent) -> None:
    await fed.bus.request(FindServer(task=TASK, run=RUN))
    assert not fed.messages_of(ServerLost)
    await fed.bus.request(FindServer(task=TASK, run=RUN, say_so=True))
    await fed.wait_for_message(ServerLost)


async def test_a_missing_app_fails_the_run_before_clients_join(
    fed: FederationHarness, agent: RunningAgent, model: Artifact
) -> None:
    app = Path(fed.config.task.path) / "tiny" / "server_app.py"
    app.write_text(app.read_text().replace("app = ServerApp()", "app = SeverApp()"))
    await fed.bus.request(StartServer(task=TASK, run=RUN, plan=PLAN, artifact=model))
    failed = await fed.wait_for_message(RunFailed)
    assert "SeverApp" in failed.reason
    assert not fed.messages_of(ServerStarted)


async def test_a_client_with_another_code_version_gets_no_message(
    fed: FederationHarness, agent: RunningAgent, model: Artifact
) -> None:
    await start_server(fed, model)
    other_code = ClientJoined(task=TASK, client="c9", run=RUN, code_version="sha256:other")
    await fed.publish(other_code, sender="trainer")
    same_code = ClientJoined(task=TASK, client="c1", run=RUN, code_version=fed.config.task.code_version)
    await fed.publish(same_code, sender="trainer")
    await fed.publish(BeginTraining(task=TASK, run=RUN, cohort=("c1",)), sender="server-manager")
    await fed.wait_for_message(RoundMessage)
    assert {message.client for message in fed.messages_of(RoundMessage)} == {"c1"}
