"""The inference agent, heard from outside: models by the bus, predictions by HTTP."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from nats import connect as nats_connect
from nats.aio.client import Client
from nats.aio.msg import Msg
from support import eventually
from support.federation import TASK, FederationHarness, RunningAgent

from fedbus.agents.inference.agent import InferenceAgent
from fedbus.agents.inference.event_queue import EventQueue
from fedbus.agents.inference.http_server import InferenceBindError, InferenceServer
from fedbus.agents.inference.offline_evaluation import OfflineEvaluation
from fedbus.app.composition.agents import ClientConfig
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.bus.streams import consumer_name, events_stream, stream_for
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.catalogue import CLIENT_CONSUMERS
from fedbus.contracts.client import (
    INFERENCE,
    InferenceData,
    InferenceEvent,
    InferReady,
    InferRefused,
    InferStart,
    InferUpdate,
)
from fedbus.contracts.envelope import MAX_EVENT_BYTES
from fedbus.contracts.model import ModelRef
from fedbus.contracts.serving import (
    CapturePaused,
    CaptureResumed,
    ModelCanaried,
    ModelCommitted,
    ModelPrepared,
    ModelRejected,
    ModelRolledBack,
    ModelShadowed,
)
from fedbus.contracts.task.serving import ServingTable
from fedbus.learning import weights
from fedbus.learning.predictor import ModelRefused
from fedbus.stores.captured.reader import count_rows
from fedbus.stores.captured.store import CapturedData

NAME = "c1"
Array = np.ndarray[Any, Any]
PROBE = np.ones((2, 3), np.float32)


class WeightedSumPredictor:
    """Answers with the sum of a sample, times its weight: a model that needs no torch. A weight above 99 is lame."""

    input_shape = None
    input_dtype = np.dtype(np.float32)
    classes: int | None = None

    def __init__(self, start: InferStart) -> None:
        arrays = weights.load(Path(start.path))
        if set(arrays) != {"w"}:
            raise ModelRefused(f"the weights are not those of Sums: {sorted(arrays)}")
        self._weight = arrays["w"]

    def predict(self, inputs: Array) -> Array:
        if self._weight[0] > 99 and (inputs == 13).any():
            raise RuntimeError("it stumbles over a 13")
        answers: Array = inputs.sum(axis=1) * self._weight
        return answers


def make_agent(
    device: ClientConfig, *, port: int = 0, looks_for: list[str] | None = None, **serving: Any
) -> Any:
    """An agent of *device*, in a task that wants its models served so; it *looks for* the bus at the last of these."""

    async def run(stop: asyncio.Event) -> None:
        urls, task, sayings = looks_for or [device.site.nats_url], device.site.task, EventQueue()
        table = task.table.model_copy(update={"serving": ServingTable.model_validate(serving)})
        task = task.model_copy(update={"table": table})
        captured = CapturedData(device.captured())
        agent = InferenceAgent(
            task,
            device.client,
            InferenceServer(captured, name=task.id),
            load=WeightedSumPredictor,
            trials=OfflineEvaluation(table.serving, table.capture, database=captured.path, probe=PROBE),
            outbox=device.outbox("inference"),
            directory=device.directory,
            sayings=sayings,
            port=port,
        )
        try:
            await agent.run(
                stop, lambda: replace(device.site, nats_url=urls[-1]).bus("inference", device.client)
            )
        finally:
            await captured.close()

    return run


@pytest.fixture
async def enrolled(fed: FederationHarness) -> None:
    for agent in CLIENT_CONSUMERS:
        await fed.bus.create_client_consumer(agent, task=TASK, client=NAME)


@pytest.fixture
async def inference(fed: FederationHarness, enrolled: None) -> AsyncIterator[RunningAgent]:
    """An inference agent without a model."""
    async with fed.run_agent(make_agent(fed.client_config(NAME))) as agent:
        await fed.wait_for_state("inference", "empty")
        yield agent


@pytest.fixture
async def serving(fed: FederationHarness, inference: RunningAgent) -> RunningAgent:
    """One that serves version 1, whose weight is 1."""
    await send_model(fed, InferStart, model_file(fed, 1))
    await fed.wait_for_message(InferReady)
    await fed.wait_for_event("inference", "infer_start")  # events and transitions come by two roads
    return inference


def model_file(fed: FederationHarness, version: int, **arrays: Array) -> tuple[ModelRef, Path]:
    path = fed.config.home / f"v{version}.safetensors"
    artifact = weights.save(arrays or {"w": np.array([version], np.float32)}, path)
    return ModelRef(**artifact.model_dump(), version=version), path


async def send_model(
    fed: FederationHarness, word: type[InferStart], model: tuple[ModelRef, Path], *, term: int = 0
) -> None:
    said = word(task=TASK, client=NAME, model=model[0], path=str(model[1]), term=term)
    await fed.publish(said, sender="client-manager")


def inference_endpoint(fed: FederationHarness) -> str:
    facts = fed.last_transition("inference").facts
    assert isinstance(facts, InferenceData)
    return facts.endpoint


async def predict(url: str, *inputs: float, **more: Any) -> tuple[float, int]:
    """What comes of *inputs*, else of 1 + 2 + 3, and by which version."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/predict", json={"inputs": [inputs or (1, 2, 3)], **more}) as response,
    ):
        assert response.status == 200, await response.text()
        answer = await response.json()
        return answer["outputs"][0], answer["model_version"]


async def test_the_first_model_is_served_where_the_agent_says(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    ready = fed.messages_of(InferReady)[0]
    assert ready.endpoint == inference_endpoint(fed)
    assert await predict(ready.endpoint) == (6.0, 1)
    assert fed.events_of("inference") == ["started", "infer_start"]


async def test_a_newer_model_takes_the_place_of_the_old(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await send_model(fed, InferUpdate, model_file(fed, 2))
    assert (await fed.wait_for_message(InferReady, times=2)).model.version == 2
    assert await predict(inference_endpoint(fed)) == (12.0, 2)
    assert fed.events_of("inference")[2:] == ["infer_update", "model_loaded"]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"w": np.array([np.nan], np.float32)}, "NaN"),
        ({"v": np.array([1], np.float32)}, r"the weights are not those of Sums: \['v'\]"),
        ({"w": np.array([1, 2, 3, 4], np.float32)}, "could not be broadcast"),
    ],
    ids=["not a number", "another architecture", "no answer to the probe"],
)
async def test_a_bad_model_is_refused_and_the_old_one_goes_on(
    fed: FederationHarness, serving: RunningAgent, arrays: dict[str, Array], reason: str
) -> None:
    bad = model_file(fed, 2, **arrays)
    await send_model(fed, InferUpdate, bad)
    refused = await fed.wait_for_message(InferRefused)
    assert (refused.model, refused.serving) == (bad[0], 1)
    assert re.search(reason, refused.reason)
    assert await predict(inference_endpoint(fed)) == (6.0, 1)
    assert fed.events_of("inference")[2:] == ["infer_update", "load_refused"]
    await send_model(fed, InferUpdate, model_file(fed, 3))
    await fed.wait_for_message(InferReady, times=2)
    assert await predict(inference_endpoint(fed)) == (18.0, 3)


async def test_where_nothing_serves_a_bad_model_is_refused_and_a_good_one_begins(
    fed: FederationHarness, inference: RunningAgent
) -> None:
    await send_model(fed, InferStart, model_file(fed, 1, w=np.array([np.inf], np.float32)))
    assert (await fed.wait_for_message(InferRefused)).serving is None
    assert fed.events_of("inference") == ["started"]
    await send_model(fed, InferStart, model_file(fed, 2))
    await fed.wait_for_message(InferReady)
    assert await predict(inference_endpoint(fed)) == (12.0, 2)


async def test_a_model_that_is_served_already_is_ready_at_once(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await send_model(fed, InferStart, model_file(fed, 1))
    await fed.wait_for_message(InferReady, times=2)
    assert fed.events_of("inference") == ["started", "infer_start"]


async def test_a_file_that_is_gone_is_a_refusal(fed: FederationHarness, serving: RunningAgent) -> None:
    model, path = model_file(fed, 2)
    path.unlink()
    await send_model(fed, InferUpdate, (model, path))
    assert "there are no weights at" in (await fed.wait_for_message(InferRefused)).reason


async def test_predictions_do_not_stop_for_a_model_that_changes(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    url, versions, done = inference_endpoint(fed), list[int](), asyncio.Event()

    async def users() -> None:
        while not done.is_set():
            output, version = await predict(url)
            assert output == 6.0 * version
            versions.append(version)

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(users())
        for version in range(2, 12):
            await send_model(fed, InferUpdate, model_file(fed, version))
            await fed.wait_for_message(InferReady, times=version)
        await eventually(lambda: bool(versions) and versions[-1] == 11)
        done.set()
    assert len(set(versions)) > 2


# --- restarts ---------------------------------------------------------------------------------------------


async def test_restarted_it_serves_what_it_served_before_it_is_told_anything(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await send_model(fed, InferUpdate, model_file(fed, 2))
    await fed.wait_for_message(InferReady, times=2)
    await fed.wait_for_event("inference", "model_loaded")  # events and transitions come by two roads
    before = len(fed.transitions_of("inference"))
    await serving.restart()
    await fed.wait_for_event("inference", "infer_start", times=2)
    assert await predict(inference_endpoint(fed)) == (12.0, 2)
    assert fed.events_of("inference")[before:] == ["restarted", "infer_start"]
    assert len(fed.messages_of(InferReady)) == 2


async def test_restarted_without_its_file_it_waits_to_be_told(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await serving.kill()
    (fed.config.home / "v1.safetensors").unlink()
    serving.start()
    await fed.wait_for_event("inference", "restarted")
    await send_model(fed, InferStart, model_file(fed, 2))
    await fed.wait_for_message(InferReady, times=2)
    assert await predict(inference_endpoint(fed)) == (12.0, 2)


async def test_a_note_of_the_last_model_that_cannot_be_read_is_let_go(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await serving.kill()
    (fed.client_config(NAME).directory / "serving.json").write_text(
        '{"task": "tin'
    )  # the power went while it was written
    serving.start()
    await fed.wait_for_event("inference", "restarted")
    await send_model(fed, InferStart, model_file(fed, 2))
    await fed.wait_for_message(InferReady, times=2)


async def test_killed_while_it_changes_models_it_begins_again(fed: FederationHarness, enrolled: None) -> None:
    device = fed.client_config(NAME)
    bus = await fed.connect_as("inference", NAME)
    async with LifecycleStore.open(bus, device.outbox("inference")) as lives:
        life = await lives.of(INFERENCE, InferenceData(task=TASK, client=NAME))
        await life.create()
        await life.transition(InferenceEvent.INFER_START)
        await life.transition(InferenceEvent.INFER_UPDATE)
    async with fed.run_agent(make_agent(device)):
        assert (await fed.wait_for_event("inference", "restarted")).source == "updating"
        await send_model(fed, InferStart, model_file(fed, 2))
        await fed.wait_for_message(InferReady)


async def test_a_port_that_is_taken_is_one_clear_line(fed: FederationHarness, serving: RunningAgent) -> None:
    port = int(inference_endpoint(fed).rpartition(":")[2])
    with pytest.raises(InferenceBindError, match="choose another port"):
        await make_agent(fed.client_config("c2"), port=port)(asyncio.Event())


# --- without the bus --------------------------------------------------------------------------------------


UNREACHABLE_URL = "nats://127.0.0.1:1"


async def test_it_serves_before_the_bus_is_there_and_joins_when_it_comes(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await serving.stop()
    before, port, urls = len(fed.transitions_of("inference")), unused_port(), [UNREACHABLE_URL]
    async with fed.run_agent(make_agent(fed.client_config(NAME), port=port, looks_for=urls)):
        url = f"http://127.0.0.1:{port}"
        await eventually(lambda: responds(url))
        assert await predict(url) == (6.0, 1)
        urls.append(fed.config.nats_url)
        await fed.wait_for_event("inference", "infer_start", times=2)
        assert fed.events_of("inference")[before:] == ["restarted", "infer_start"]
        await send_model(fed, InferUpdate, model_file(fed, 2))
        await fed.wait_for_message(InferReady, times=2)
        assert await predict(url) == (12.0, 2)


async def test_a_new_device_waits_for_the_bus_and_says_that_it_has_no_model(fed: FederationHarness) -> None:
    port = unused_port()
    async with fed.run_agent(make_agent(fed.client_config(NAME), port=port, looks_for=[UNREACHABLE_URL])):
        url = f"http://127.0.0.1:{port}"
        await eventually(lambda: responds(url, "/live"))
        async with aiohttp.ClientSession() as session, session.get(f"{url}/ready") as response:
            assert response.status == 503


async def responds(url: str, path: str = "/ready") -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}{path}") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def unused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


# --- asked over the bus -----------------------------------------------------------------------------------


async def test_predictions_can_be_asked_for_over_the_bus(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    """As `nats req fedbus.test.local.c1.tiny.predict '{"inputs": [[1, 2, 3]]}'` does, with no envelope."""
    answer = json.loads((await request_raw(fed, b'{"inputs": [[1, 2, 3]]}')).data)
    assert (answer["outputs"], answer["model_version"]) == ([6.0], 1)
    assert isinstance(answer["ids"][0], int)


async def test_a_question_over_the_bus_that_makes_no_sense_is_refused_with_the_reason(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    reply = await request_raw(fed, b'{"inputs": []}')
    assert reply.headers is not None
    assert reply.headers["Nats-Service-Error-Code"] == "400"
    assert "at least one sample" in reply.headers["Nats-Service-Error"]
    assert json.loads(reply.data)["error"] == reply.headers["Nats-Service-Error"]


async def test_nats_micro_shows_who_answers(fed: FederationHarness, serving: RunningAgent) -> None:
    async with plain_nats(fed) as client:
        info = json.loads((await client.request("$SRV.INFO.fedbus-predict", b"", timeout=5)).data)
    assert info["metadata"] == {"task": TASK, "federation": "test", "owner": NAME}
    assert [one["subject"] for one in info["endpoints"]] == ["fedbus.test.local.c1.tiny.predict"]


@asynccontextmanager
async def plain_nats(fed: FederationHarness) -> AsyncIterator[Client]:
    client = await nats_connect(fed.config.nats_url)
    try:
        yield client
    finally:
        await client.close()


async def request_raw(fed: FederationHarness, content: bytes) -> Msg:
    async with plain_nats(fed) as client:
        return await client.request("fedbus.test.local.c1.tiny.predict", content, timeout=5)


# --- in two phases ------------------------------------------------------------------------------------------


@asynccontextmanager
async def serve_with(fed: FederationHarness, **table: Any) -> AsyncIterator[str]:
    """One that serves version 1 and takes up models so; where it is asked."""
    async with fed.run_agent(make_agent(fed.client_config(NAME), **table)):
        await send_model(fed, InferStart, model_file(fed, 1))
        yield (await fed.wait_for_message(InferReady)).endpoint  # its transition comes by another road


@asynccontextmanager
async def send_predictions(url: str, *inputs: float) -> AsyncIterator[list[tuple[float, int]]]:
    """Somebody who asks and asks; what came of it."""
    given, over = list[tuple[float, int]](), asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            given.append(await predict(url, *inputs))

    async with asyncio.TaskGroup() as group:
        group.create_task(ask())
        try:
            yield given
        finally:
            over.set()


async def test_what_the_bus_will_not_have_is_let_go_and_the_rest_is_told(fed: FederationHarness) -> None:
    """A body that is too large for any stream, and one that the stream refuses: neither ends who says it."""
    sayings, stream = EventQueue(), events_stream(fed.config.federation)
    speaker = await fed.connect_as("inference", NAME)
    for reason in ("x" * (MAX_EVENT_BYTES + 1), "y" * 2000):
        sayings.say(CapturePaused(task=TASK, client=NAME, reason=reason))
    sayings.say(CaptureResumed(task=TASK, client=NAME))
    client = await nats_connect(fed.config.nats_url)
    try:
        config = (await client.jetstream().stream_info(stream)).config
        await client.jetstream().update_stream(replace(config, max_msg_size=1500))
    finally:
        await client.close()
    telling = asyncio.create_task(sayings.tell(speaker))
    await fed.wait_for_message(CaptureResumed)
    assert not telling.done()
    assert not fed.messages_of(CapturePaused)
    telling.cancel()


async def test_each_step_is_told_with_its_figures(fed: FederationHarness, serving: RunningAgent) -> None:
    url = fed.messages_of(InferReady)[0].endpoint
    for _ in range(3):
        await predict(url)
    await eventually(lambda: count_rows(fed.client_config(NAME).captured()) == 3)
    await send_model(fed, InferUpdate, model_file(fed, 2))
    prepared = await fed.wait_for_message(ModelPrepared, times=2)
    assert (prepared.model.version, prepared.serving, prepared.probed, prepared.replayed) == (2, 1, 2, 3)
    committed = await fed.wait_for_message(ModelCommitted, times=2)
    assert (committed.model.version, committed.replaced) == (2, 1)


async def test_a_model_that_does_not_answer_the_last_captured_inputs_is_refused(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await predict(fed.messages_of(InferReady)[0].endpoint, 13, 0, 0)
    await eventually(lambda: count_rows(fed.client_config(NAME).captured()) == 1)
    await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([100], np.float32)))
    assert (
        "last 1 captured inputs: it stumbles over a 13" in (await fed.wait_for_message(InferRefused)).reason
    )
    assert (await fed.wait_for_message(ModelRejected)).step == "load"


async def test_a_model_that_is_worse_on_the_devices_own_labels_is_refused(
    fed: FederationHarness, enrolled: None
) -> None:
    async with serve_with(fed, **{"min-holdout": 10}) as url:
        for n in range(100):
            await predict(url, n, 0, 0, labels=[n])  # version 1 is right
        await eventually(lambda: count_rows(fed.client_config(NAME).captured()) == 100)
        await send_model(fed, InferUpdate, model_file(fed, 2))
        assert "labelled samples of this device" in (await fed.wait_for_message(InferRefused)).reason
        down = await fed.wait_for_message(ModelRejected)
        assert (down.step, down.old_score, down.serving) == ("holdout", 1.0, 1)
        assert await predict(url) == (6.0, 1)
        await send_model(fed, InferUpdate, model_file(fed, 3, w=np.array([1], np.float32)))
        prepared = await fed.wait_for_message(ModelPrepared, times=2)
        assert (prepared.old_score, prepared.new_score) == (1.0, 1.0)
        assert prepared.holdout >= 10


async def test_in_the_shadow_both_answer_and_the_old_ones_answers_are_given(
    fed: FederationHarness, enrolled: None
) -> None:
    async with serve_with(fed, **{"shadow-samples": 20}) as url, send_predictions(url) as given:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        shadowed = await fed.wait_for_message(ModelShadowed)
        assert shadowed.beside.samples >= 20
        assert shadowed.beside.disagreement == 1.0  # twice as much is another answer
        assert shadowed.beside.old_ms is not None
        assert shadowed.beside.new_ms is not None
        await fed.wait_for_message(ModelCommitted, times=2)
        assert set(given) <= {(6.0, 1), (12.0, 2)}
        assert given.count((6.0, 1)) >= 20


async def test_a_model_that_disagrees_in_the_shadow_is_refused_and_nobody_has_seen_its_answers(
    fed: FederationHarness, enrolled: None
) -> None:
    table = {"shadow-samples": 10, "max-disagreement": 0.5}
    async with serve_with(fed, **table) as url, send_predictions(url) as given:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        assert (
            "predictions differ from the current model" in (await fed.wait_for_message(InferRefused)).reason
        )
        down = await fed.wait_for_message(ModelRejected)
        assert down.step == "shadow"
        assert down.beside is not None
        assert down.beside.disagreement == 1.0
        assert set(given) == {(6.0, 1)}


async def test_a_canary_answers_its_share(fed: FederationHarness, enrolled: None) -> None:
    table = {"canary-share": 0.25, "canary-samples": 10}
    async with serve_with(fed, **table) as url, send_predictions(url) as given:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        canaried = await fed.wait_for_message(ModelCanaried)
        await fed.wait_for_message(ModelCommitted, times=2)
        first = given.index((12.0, 2))
        during = given[first : first + 37]
        assert during.count((12.0, 2)) == 10
        assert (canaried.share, canaried.beside.errors) == (0.25, 0)


async def test_what_a_canary_fails_the_old_model_answers_and_the_canary_is_refused(
    fed: FederationHarness, enrolled: None
) -> None:
    lame = {"w": np.array([100], np.float32)}
    table = {"canary-share": 0.5, "canary-samples": 1000}
    async with serve_with(fed, **table) as url:
        await send_model(fed, InferUpdate, model_file(fed, 2, **lame))
        await fed.wait_for_message(ModelPrepared, times=2)  # what it was tried on held no 13
        async with send_predictions(url, 13, 0, 0) as given:
            assert "stumbles over a 13" in (await fed.wait_for_message(InferRefused)).reason
        down = await fed.wait_for_message(ModelRejected)
        assert down.step == "canary"
        assert down.beside is not None
        assert down.beside.errors >= 3
    assert set(given) == {(13.0, 1)}


async def test_the_old_model_is_back_when_the_new_one_errs_and_nobody_was_told_no(
    fed: FederationHarness, enrolled: None
) -> None:
    async with serve_with(fed) as url:
        await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([100], np.float32)))
        await fed.wait_for_message(InferReady, times=2)
        assert await predict(url) == (600.0, 2)
        async with send_predictions(url, 13, 0, 0) as given:
            returned = await fed.wait_for_message(ModelRolledBack)
            assert (returned.model.version, returned.returned_from.version) == (1, 2)
            assert returned.beside.errors >= 3
            assert "stumbles over a 13" in returned.reason
            await fed.wait_for_event("inference", "model_returned")
        assert set(given) == {(13.0, 1)}
        assert await predict(url) == (6.0, 1)
        await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([100], np.float32)))
        assert "returned from on this device" in (await fed.wait_for_message(InferRefused)).reason
        await send_model(fed, InferUpdate, model_file(fed, 3))
        await fed.wait_for_message(InferReady, times=3)
        assert await predict(url) == (18.0, 3)


async def test_a_model_that_was_returned_from_is_tried_again_when_it_was_named_anew(
    fed: FederationHarness, enrolled: None
) -> None:
    async with serve_with(fed) as url:
        model = model_file(fed, 2, w=np.array([100], np.float32))
        await send_model(fed, InferUpdate, model, term=7)
        await fed.wait_for_message(InferReady, times=2)
        async with send_predictions(url, 13, 0, 0):
            await fed.wait_for_message(ModelRolledBack)
            await fed.wait_for_event("inference", "model_returned")
        await send_model(fed, InferUpdate, model, term=7)
        assert "tried again: fedbus model promote 2" in (await fed.wait_for_message(InferRefused)).reason
        await send_model(fed, InferUpdate, model, term=8)
        tried = (await fed.wait_for_message(InferRefused, times=2)).reason
        assert tried.endswith("captured inputs: it stumbles over a 13")


async def test_the_old_model_is_back_when_the_new_ones_answers_drift(
    fed: FederationHarness, enrolled: None
) -> None:
    async with serve_with(fed, **{"max-answer-psi": 0.5, "min-answers": 20}) as url:
        for n in range(40):
            await predict(url, n % 4, 0, 0)
        await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([50], np.float32)))
        await fed.wait_for_message(InferReady, times=2)
        for n in range(40):
            await predict(url, n % 4, 0, 0)
        returned = await fed.wait_for_message(ModelRolledBack)
        assert "answers have drifted" in returned.reason
        assert returned.beside.answer_psi is not None
        assert returned.beside.answer_psi > 0.5
        await fed.wait_for_event("inference", "model_returned")


async def test_of_models_that_come_too_fast_the_newest_is_taken_up(
    fed: FederationHarness, enrolled: None
) -> None:
    async with serve_with(fed, **{"shadow-samples": 1, "shadow-s": 60.0}) as url:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        await fed.wait_for_state("inference", "updating")  # until a prediction ends the shadow
        for version in (3, 4, 5):
            await send_model(fed, InferUpdate, model_file(fed, version))
        await eventually(lambda: has_consumed_all(fed))
        await eventually(lambda: is_serving(url, 5))
        await fed.wait_until(
            lambda: fed.messages_of(ModelCommitted)[-1].model.version == 5
        )  # told after it answers
    assert [one.model.version for one in fed.messages_of(ModelCommitted)] == [1, 2, 5]


async def has_consumed_all(fed: FederationHarness) -> bool:
    name = consumer_name(NAME, TASK, AgentName.INFERENCE)
    info = await fed.bus._js.consumer_info(stream_for(fed.bus.fed, AgentName.INFERENCE), name)
    return not info.num_pending and not info.num_ack_pending


async def is_serving(url: str, version: int) -> bool:
    return (await predict(url))[1] == version
