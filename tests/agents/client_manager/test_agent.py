"""The client manager on a real bus: the server and the other agents of the device are simulated."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs
from support import eventually
from support.fake_server import (
    CLIENT_NAME,
    RUN,
    FakeServer,
    send_infer_ready,
    send_infer_refused,
    send_model_rolled_back,
    wait_for_infer_start,
)
from support.federation import TASK, FederationHarness, RunningAgent

from fedbus.agents.client_manager.agent import BootstrapFailed, ClientManager
from fedbus.app.composition.agents import ClientConfig, client_manager
from fedbus.bus.errors import StaleOwner
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import (
    CLIENT,
    ClientData,
    ClientEvent,
    ClientStart,
    FailTrain,
    FinTrain,
    InferStart,
    InferUpdate,
)
from fedbus.contracts.code import CodePublished, CodeRefused
from fedbus.contracts.examples import MODEL
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import (
    ModelPublished,
)
from fedbus.learning import weights


@pytest.fixture
async def server(fed: FederationHarness) -> AsyncIterator[FakeServer]:
    async with FakeServer(fed).serve() as server:
        await server.set_model(1)
        yield server


def make_manager(device: ClientConfig, bootstrap_s: float = 20.0) -> Any:
    async def run(stop: asyncio.Event) -> None:
        async with device.agent_config.connect_bus("client-manager", device.client) as bus:
            await ClientManager(
                bus,
                device.agent_config.task,
                device.client,
                directory=device.directory,
                outbox=device.open_outbox("client-manager"),
                bootstrap_s=bootstrap_s,
            ).run(stop)

    return run


@pytest.fixture
async def starting(fed: FederationHarness, server: FakeServer) -> AsyncIterator[RunningAgent]:
    """A client that has handed over its first model and has no answer yet."""
    async with fed.run_agent(lambda stop: client_manager(fed.client_config(CLIENT_NAME), stop)) as agent:
        await fed.wait_for_message(InferStart)
        yield agent


@pytest.fixture
async def client(fed: FederationHarness, starting: RunningAgent) -> RunningAgent:
    """A client that serves."""
    await send_infer_ready(fed, await wait_for_infer_start(fed))
    await fed.wait_for_state("client", "serving")
    return starting


async def send_fin_train(fed: FederationHarness, run: str = RUN) -> None:
    await fed.publish(FinTrain(task=TASK, client=CLIENT_NAME, run=run), sender="flower-client")


async def send_fail_train(fed: FederationHarness, run: str = RUN, *, lost: bool = False) -> None:
    message = FailTrain(task=TASK, client=CLIENT_NAME, run=run, reason="it broke", trainer_lost=lost)
    await fed.publish(message, sender="flower-client")


async def begin_learning(fed: FederationHarness, server: FakeServer) -> None:
    await server.send_invitation()
    await fed.wait_for_message(ClientStart)
    await fed.wait_for_state("client", "learning")


def served_version(fed: FederationHarness) -> int | None:
    facts = fed.last_transition("client").facts
    assert isinstance(facts, ClientData)
    return facts.model.version if facts.model else None


# --- the start -------------------------------------------------------------------------------------------


async def test_a_client_fetches_the_model_and_serves_it(
    fed: FederationHarness, starting: RunningAgent
) -> None:
    start = fed.messages_of(InferStart)[0]
    np.testing.assert_array_equal(weights.load(Path(start.path))["w"], np.ones(8))
    await send_infer_ready(fed, start.model)
    await fed.wait_for_state("client", "serving")
    assert fed.events_of("client") == ["started", "model_fetched", "infer_ready"]
    assert served_version(fed) == 1


async def test_a_model_on_disk_is_not_fetched_again(
    fed: FederationHarness, server: FakeServer, client: RunningAgent
) -> None:
    assert server.offer
    server.offer.release()
    server.offers.clear()  # no agent offers it any more
    await client.restart()
    await wait_for_infer_start(fed, times=2)


async def test_a_client_waits_for_its_server(fed: FederationHarness) -> None:
    async with fed.run_agent(make_manager(fed.client_config(CLIENT_NAME))):
        await fed.wait_for_event("client", "started")
        async with FakeServer(fed).serve() as server:
            await eventually(lambda: server.info_request_count > 0)
            await server.set_model(1)
            await wait_for_infer_start(fed)


async def test_a_client_without_a_server_ends_at_its_limit(fed: FederationHarness) -> None:
    async with fed.run_agent(make_manager(fed.client_config(CLIENT_NAME), bootstrap_s=0.3)) as agent:
        with pytest.RaisesGroup(BootstrapFailed, allow_unwrapped=True, flatten_subgroups=True):
            await agent.wait_for_end()
    transition = await fed.wait_for_state("client", "terminated")
    assert transition.reason == "no server of tiny answered within 0.3 s"


async def test_a_client_that_found_no_model_starts_after_a_restart(
    fed: FederationHarness,
) -> None:
    async with FakeServer(fed).serve() as server:
        async with fed.run_agent(make_manager(fed.client_config(CLIENT_NAME), bootstrap_s=0.5)) as agent:
            with pytest.RaisesGroup(BootstrapFailed, allow_unwrapped=True, flatten_subgroups=True):
                await agent.wait_for_end()
        await server.set_model(1)
        async with fed.run_agent(make_manager(fed.client_config(CLIENT_NAME))):
            await wait_for_infer_start(fed)
    assert fed.events_of("client") == ["started", "bootstrap_failed", "restarted", "model_fetched"]


async def test_a_server_without_a_model_is_logged_once_as_info(
    fed: FederationHarness,
) -> None:
    with capture_logs() as lines:
        async with (
            FakeServer(fed).serve() as server,
            fed.run_agent(make_manager(fed.client_config(CLIENT_NAME))),
        ):
            await eventually(lambda: server.info_request_count >= 3)
            await server.set_model(1)
            await wait_for_infer_start(fed)
    assert [one["log_level"] for one in lines if one["event"] == "No model yet"] == ["info"]


async def test_a_refused_client_ends_with_the_reason(fed: FederationHarness, server: FakeServer) -> None:
    server.refusal = "not in this federation"
    async with fed.run_agent(make_manager(fed.client_config(CLIENT_NAME))) as agent:
        with pytest.RaisesGroup(
            pytest.RaisesExc(BootstrapFailed, match="client c1 cannot start: not in this federation"),
            allow_unwrapped=True,
            flatten_subgroups=True,
        ):
            await agent.wait_for_end()


# --- training ----------------------------------------------------------------------------------------------


async def test_a_run_ends_with_its_model_being_served(
    fed: FederationHarness, server: FakeServer, client: RunningAgent
) -> None:
    await begin_learning(fed, server)
    start = fed.messages_of(ClientStart)[0]
    assert (start.run, start.code_version) == (RUN, fed.config.task.code_version)
    second = await server.publish_model(2)
    await send_fin_train(fed)
    update = await fed.wait_for_message(InferUpdate)
    assert update.model == second
    await send_infer_ready(fed, second)
    await fed.wait_for_state("client", "serving")
    assert fed.events_of("client")[3:] == ["client_start", "fin_train", "infer_ready"]
    assert served_version(fed) == 2


async def test_a_run_without_a_version_is_awaited_within_a_limit(
    fed: FederationHarness, server: FakeServer, client: RunningAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.agents.client_manager.machine.APPLY_S", 0.2)
    await begin_learning(fed, server)
    await send_fin_train(fed)
    assert (await fed.wait_for_event("client", "no_new_model")).target == "serving"
    assert served_version(fed) == 1


@pytest.mark.parametrize(("lost", "event"), [(False, "fail_train"), (True, "trainer_lost")])
async def test_a_failure_in_training_leaves_the_client_serving(
    fed: FederationHarness, server: FakeServer, client: RunningAgent, lost: bool, event: str
) -> None:
    await begin_learning(fed, server)
    await send_fail_train(fed, lost=lost)
    transition = await fed.wait_for_event("client", event)
    assert (transition.target, transition.reason) == ("serving", "it broke")


async def test_a_client_leaves_a_run_that_does_not_end(
    fed: FederationHarness, server: FakeServer, client: RunningAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.agents.client_manager.run_choice.SPARE_S", 0.1)
    await server.send_invitation(plan=RunPlan(rounds=1, recruit_s=0.1, round_s=0.1))
    transition = await fed.wait_for_event("client", "client_start")
    assert transition.deadline is not None
    assert (await fed.wait_for_event("client", "deadline")).target == "serving"


async def test_a_client_that_missed_the_invitation_joins(
    fed: FederationHarness, server: FakeServer, starting: RunningAgent
) -> None:
    server.open_run = server.make_invitation()
    await send_infer_ready(fed, await wait_for_infer_start(fed))
    assert (await fed.wait_for_message(ClientStart)).run == RUN


# --- models ---------------------------------------------------------------------------------------------------


async def test_a_published_model_is_served_in_place_of_the_old(
    fed: FederationHarness, server: FakeServer, client: RunningAgent
) -> None:
    second = await server.publish_model(2)
    update = await fed.wait_for_message(InferUpdate)
    assert weights.load(Path(update.path))["w"][0] == 2
    await send_infer_ready(fed, second)
    await fed.wait_for_state("client", "serving")
    assert fed.events_of("client")[3:] == ["model_published", "infer_ready"]
    assert served_version(fed) == 2


async def test_after_a_refused_model_the_next_one_is_applied(
    fed: FederationHarness, server: FakeServer, client: RunningAgent
) -> None:
    second = await server.publish_model(2)
    await fed.wait_for_message(InferUpdate)
    await send_infer_refused(fed, second, serving=1)
    transition = await fed.wait_for_event("client", "infer_refused")
    assert (transition.target, transition.reason, served_version(fed)) == ("serving", "NaN", 1)
    third = await server.publish_model(3)
    await fed.wait_for_message(InferUpdate, times=2)
    await send_infer_ready(fed, third)
    await fed.wait_for_event("client", "infer_ready", times=2)
    assert served_version(fed) == 3


async def test_a_model_that_was_rolled_back_is_not_applied_again(
    fed: FederationHarness, server: FakeServer, client: RunningAgent
) -> None:
    first, second = fed.messages_of(InferStart)[0].model, await server.publish_model(2)
    await fed.wait_for_message(InferUpdate)
    await send_infer_ready(fed, second)
    await fed.wait_for_event("client", "infer_ready", times=2)
    await send_model_rolled_back(fed, first, second)
    assert (await fed.wait_for_event("client", "model_returned")).reason == "it errs"
    assert served_version(fed) == 1
    await begin_learning(fed, server)
    await send_fail_train(fed)  # it looks for a newer model, and there is none
    await fed.wait_for_event("client", "fail_train")
    assert served_version(fed) == 1
    await send_model_rolled_back(fed, first, second)  # delivered twice
    third = await server.publish_model(3)
    await fed.wait_for_message(InferUpdate, times=2)
    await send_infer_ready(fed, third)
    await fed.wait_for_event("client", "infer_ready", times=3)
    assert fed.events_of("client").count("model_returned") == 1
    assert served_version(fed) == 3


async def test_a_refused_first_model_is_tried_until_one_is_accepted(
    fed: FederationHarness, server: FakeServer, starting: RunningAgent
) -> None:
    await send_infer_refused(fed, await wait_for_infer_start(fed), serving=None)
    await send_infer_refused(fed, await wait_for_infer_start(fed, times=2), serving=None)
    await server.set_model(2)
    again = await wait_for_infer_start(fed, times=3)
    await send_infer_ready(fed, again)
    await fed.wait_for_state("client", "serving")
    assert fed.events_of("client")[2:] == ["infer_retried", "infer_retried", "infer_ready"]


async def test_a_silent_inference_agent_is_awaited_within_a_limit(
    fed: FederationHarness, server: FakeServer, client: RunningAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.agents.client_manager.machine.APPLY_S", 0.2)
    await server.publish_model(2)
    transition = await fed.wait_for_event("client", "infer_refused")
    assert "did not answer in time (limit 0.2 s)" in transition.reason
    assert served_version(fed) == 1


async def test_a_model_is_fetched_from_the_next_offer(
    fed: FederationHarness, server: FakeServer, client: RunningAgent
) -> None:
    model, blob = await server.set_model(2)
    server.offers.pop().release()  # the server manager was restarted in between
    asked = server.info_request_count
    await fed.publish(ModelPublished(task=TASK, model=model, blob=blob), sender="server-manager")
    await eventually(lambda: server.info_request_count > asked)
    await server.set_model(2)
    update = await fed.wait_for_message(InferUpdate)
    assert weights.load(Path(update.path))["w"][0] == 2


# --- code -------------------------------------------------------------------------------------------------------


async def test_a_code_directory_cannot_follow_a_new_version(
    fed: FederationHarness, server: FakeServer, client: RunningAgent
) -> None:
    await fed.publish(CodePublished(task=TASK, code_version="sha256:abcdef0123456"), sender="server-manager")
    transition = await fed.wait_for_event("client", "code_refused")
    assert transition.reason.startswith("code abcdef012345: ")
    assert "is a directory with one version; to follow new versions, give git+https" in transition.reason
    assert transition.target == "serving"
    message = await fed.wait_for_message(CodeRefused)
    assert (message.code_version, message.stays_on) == ("sha256:abcdef0123456", fed.config.task.code_version)


# --- a client manager that is killed, or is not alone -------------------------------------------------------------


async def test_a_client_killed_while_serving_serves_again(
    fed: FederationHarness, server: FakeServer, client: RunningAgent
) -> None:
    await client.restart()
    await send_infer_ready(fed, await wait_for_infer_start(fed, times=2))
    await fed.wait_for_event("client", "infer_ready", times=2)
    assert fed.events_of("client")[3:] == ["restarted", "model_fetched", "infer_ready"]


async def test_a_client_killed_while_applying_starts_again(
    fed: FederationHarness, server: FakeServer, starting: RunningAgent
) -> None:
    await starting.restart()
    transition = await fed.wait_for_event("client", "restarted")
    assert transition.source == "pending_application"
    await wait_for_infer_start(fed, times=2)


async def test_a_client_killed_while_learning_joins_its_run_again(
    fed: FederationHarness, server: FakeServer, client: RunningAgent
) -> None:
    await begin_learning(fed, server)
    server.open_run = server.make_invitation()
    await client.restart()
    await send_infer_ready(fed, await wait_for_infer_start(fed, times=2))
    await fed.wait_for_message(ClientStart, times=2)
    second = await server.publish_model(2)
    server.open_run = None
    await send_fin_train(fed)
    await fed.wait_for_message(InferUpdate)
    await send_infer_ready(fed, second)
    await fed.wait_for_state("client", "serving")
    assert served_version(fed) == 2


async def test_a_client_killed_while_syncing_starts_again(fed: FederationHarness, server: FakeServer) -> None:
    device = fed.client_config(CLIENT_NAME)
    bus = await fed.connect_as("client-manager", CLIENT_NAME)
    async with LifecycleStore.open(bus, device.open_outbox("client-manager")) as lifecycles:
        life = await lifecycles.load(CLIENT, ClientData(task=TASK, client=CLIENT_NAME))
        await life.create()
        await life.transition(ClientEvent.MODEL_FETCHED, {"model": MODEL})
        await life.transition(ClientEvent.INFER_READY)
        await life.transition(ClientEvent.CODE_PUBLISHED)
    async with fed.run_agent(lambda stop: client_manager(device, stop)):
        await wait_for_infer_start(fed)
    assert (await fed.wait_for_event("client", "restarted")).source == "syncing"


async def test_the_first_of_two_owners_of_a_client_ends(fed: FederationHarness, server: FakeServer) -> None:
    async with fed.run_agent(make_manager(fed.client_config(CLIENT_NAME))) as first:
        await send_infer_ready(fed, await wait_for_infer_start(fed))
        await fed.wait_for_state("client", "serving")
        copy = ClientConfig(
            fed.config.__class__(
                fed.config.nats_url, fed.config.federation, fed.config.home / "copy", fed.config.task
            ),
            fed.client_config(CLIENT_NAME).client,
        )
        async with fed.run_agent(make_manager(copy)):
            await wait_for_infer_start(fed, times=2)
            await send_infer_ready(fed, fed.messages_of(InferStart)[0].model)
            await fed.wait_for_event("client", "infer_ready", times=2)
            await server.publish_model(2)  # both receive it, and both would move
            with pytest.RaisesGroup(StaleOwner, allow_unwrapped=True, flatten_subgroups=True):
                await first.wait_for_end()
    # the refused transition is not published after the next start either
    async with fed.run_agent(make_manager(fed.client_config(CLIENT_NAME))):
        await fed.wait_for_event("client", "restarted", times=2)
