"""The inference agent as its clients see it: models over the bus, predictions over HTTP and NATS."""

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
from fedbus.learning.predictor import ModelNotServed, ModelRefused
from fedbus.stores.captured.reader import count_rows
from fedbus.stores.captured.store import CapturedData

NAME = "c1"
Array = np.ndarray[Any, Any]
PROBE = np.ones((2, 3), np.float32)


class WeightedSumPredictor:
    """A model without torch: predicts the sum of a sample times its weight. With a weight above 99 it fails on 13."""

    input_shape = None
    input_dtype = np.dtype(np.float32)
    classes: int | None = None

    def __init__(self, start: InferStart) -> None:
        arrays = weights.load(Path(start.path))
        if "unserved" in arrays:
            raise ModelNotServed("it is unserved")
        if set(arrays) != {"w"}:
            raise ModelRefused(f"unexpected tensors: {sorted(arrays)}")
        self._weight = arrays["w"]

    def predict(self, inputs: Array) -> Array:
        if self._weight[0] > 99 and (inputs == 13).any():
            raise RuntimeError("failed on 13")
        outputs: Array = inputs.sum(axis=1) * self._weight
        return outputs


def make_agent(
    device: ClientConfig, *, port: int = 0, nats_urls: list[str] | None = None, **serving: Any
) -> Any:
    """Make an inference agent of *device* with the *serving* table; it connects to the last of *nats_urls*."""

    async def run(stop: asyncio.Event) -> None:
        urls, task, events = (
            nats_urls or [device.agent_config.nats_url],
            device.agent_config.task,
            EventQueue(),
        )
        table = task.table.model_copy(update={"serving": ServingTable.model_validate(serving)})
        task = task.model_copy(update={"table": table})
        captured = CapturedData(device.captured_path())
        agent = InferenceAgent(
            task,
            device.client,
            InferenceServer(captured, name=task.id),
            load=WeightedSumPredictor,
            evaluation=OfflineEvaluation(table.serving, table.capture, database=captured.path, probe=PROBE),
            outbox=device.open_outbox("inference"),
            directory=device.directory,
            events=events,
            port=port,
        )
        try:
            await agent.run(
                stop,
                lambda: replace(device.agent_config, nats_url=urls[-1]).connect_bus(
                    "inference", device.client
                ),
            )
        finally:
            await captured.close()

    return run


@pytest.fixture
async def consumers(fed: FederationHarness) -> None:
    for agent in CLIENT_CONSUMERS:
        await fed.bus.create_client_consumer(agent, task=TASK, client=NAME)


@pytest.fixture
async def inference(fed: FederationHarness, consumers: None) -> AsyncIterator[RunningAgent]:
    """An inference agent without a model."""
    async with fed.run_agent(make_agent(fed.client_config(NAME))) as agent:
        await fed.wait_for_state("inference", "empty")
        yield agent


@pytest.fixture
async def serving(fed: FederationHarness, inference: RunningAgent) -> RunningAgent:
    """An inference agent that serves version 1, whose weight is 1."""
    await send_model(fed, InferStart, model_file(fed, 1))
    await fed.wait_for_message(InferReady)
    await fed.wait_for_event("inference", "infer_start")  # transitions come from another stream
    return inference


def model_file(fed: FederationHarness, version: int, **arrays: Array) -> tuple[ModelRef, Path]:
    path = fed.config.home / f"v{version}.safetensors"
    artifact = weights.save(arrays or {"w": np.array([version], np.float32)}, path)
    return ModelRef(**artifact.model_dump(), version=version), path


async def send_model(
    fed: FederationHarness, kind: type[InferStart], model: tuple[ModelRef, Path], *, term: int = 0
) -> None:
    request = kind(task=TASK, client=NAME, model=model[0], path=str(model[1]), term=term)
    await fed.publish(request, sender="client-manager")


def inference_endpoint(fed: FederationHarness) -> str:
    data = fed.last_transition("inference").facts
    assert isinstance(data, InferenceData)
    return data.endpoint


async def predict(url: str, *inputs: float, **more: Any) -> tuple[float, int]:
    """Predict *inputs*, by default (1, 2, 3); return the output and the model version."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/predict", json={"inputs": [inputs or (1, 2, 3)], **more}) as response,
    ):
        assert response.status == 200, await response.text()
        body = await response.json()
        return body["outputs"][0], body["model_version"]


async def test_the_first_model_is_served_at_the_published_endpoint(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    ready = fed.messages_of(InferReady)[0]
    assert ready.endpoint == inference_endpoint(fed)
    assert await predict(ready.endpoint) == (6.0, 1)
    assert fed.events_of("inference") == ["started", "infer_start"]


async def test_a_newer_model_replaces_the_current_one(fed: FederationHarness, serving: RunningAgent) -> None:
    await send_model(fed, InferUpdate, model_file(fed, 2))
    assert (await fed.wait_for_message(InferReady, times=2)).model.version == 2
    assert await predict(inference_endpoint(fed)) == (12.0, 2)
    assert fed.events_of("inference")[2:] == ["infer_update", "model_loaded"]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"w": np.array([np.nan], np.float32)}, "NaN"),
        ({"v": np.array([1], np.float32)}, r"unexpected tensors: \['v'\]"),
        ({"w": np.array([1, 2, 3, 4], np.float32)}, "could not be broadcast"),
    ],
    ids=["NaN weight", "other architecture", "failed probe"],
)
async def test_a_bad_model_is_refused_and_the_current_one_stays(
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


async def get_json(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.json()


async def test_a_bad_first_model_is_not_served_and_a_good_one_is(
    fed: FederationHarness, inference: RunningAgent
) -> None:
    await send_model(fed, InferStart, model_file(fed, 1, w=np.array([np.inf], np.float32)))
    refused = await fed.wait_for_message(InferRefused)
    assert (refused.serving, refused.not_served) == (None, True)
    transition = await fed.wait_for_event("inference", "model_not_served")
    assert isinstance(transition.facts, InferenceData)
    reason = transition.facts.not_served
    assert reason.startswith("version 1 is not served: ")
    status, body = await get_json(f"{inference_endpoint(fed)}/ready")
    assert (status, body) == (503, {"error": reason})
    await send_model(fed, InferStart, model_file(fed, 2))
    await fed.wait_for_message(InferReady)
    assert await predict(inference_endpoint(fed)) == (12.0, 2)


async def test_a_version_that_no_code_serves_leaves_the_old_one_serving(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    unserved = model_file(fed, 2, unserved=np.zeros(1, np.float32))
    await send_model(fed, InferUpdate, unserved)
    refused = await fed.wait_for_message(InferRefused)
    assert (refused.model, refused.serving, refused.not_served) == (unserved[0], 1, True)
    await fed.wait_for_event("inference", "model_not_served")
    assert await predict(inference_endpoint(fed)) == (6.0, 1)
    _, body = await get_json(f"{inference_endpoint(fed)}/model")
    assert (body["model"]["version"], body["not_served"]) == (1, "version 2 is not served: it is unserved")


async def test_a_version_with_the_same_weights_is_served_without_a_load(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    model, path = model_file(fed, 1)
    path.unlink()
    await send_model(fed, InferUpdate, (model.model_copy(update={"version": 2}), path))
    assert (await fed.wait_for_message(InferReady, times=2)).model.version == 2
    assert await predict(inference_endpoint(fed)) == (6.0, 2)


async def test_a_request_for_the_served_model_is_ready_at_once(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await send_model(fed, InferStart, model_file(fed, 1))
    await fed.wait_for_message(InferReady, times=2)
    assert fed.events_of("inference") == ["started", "infer_start"]


async def test_a_model_with_a_missing_file_is_refused(fed: FederationHarness, serving: RunningAgent) -> None:
    model, path = model_file(fed, 2)
    path.unlink()
    await send_model(fed, InferUpdate, (model, path))
    assert "there are no weights at" in (await fed.wait_for_message(InferRefused)).reason


async def test_predictions_continue_during_model_swaps(fed: FederationHarness, serving: RunningAgent) -> None:
    url, versions, stop = inference_endpoint(fed), list[int](), asyncio.Event()

    async def predict_until_stopped() -> None:
        while not stop.is_set():
            output, version = await predict(url)
            assert output == 6.0 * version
            versions.append(version)

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(predict_until_stopped())
        for version in range(2, 12):
            await send_model(fed, InferUpdate, model_file(fed, version))
            await fed.wait_for_message(InferReady, times=version)
        await eventually(lambda: bool(versions) and versions[-1] == 11)
        stop.set()
    assert len(set(versions)) > 2


# --- restarts ---------------------------------------------------------------------------------------------


async def test_a_restarted_agent_serves_its_last_model(fed: FederationHarness, serving: RunningAgent) -> None:
    await send_model(fed, InferUpdate, model_file(fed, 2))
    await fed.wait_for_message(InferReady, times=2)
    await fed.wait_for_event("inference", "model_loaded")  # transitions come from another stream
    before = len(fed.transitions_of("inference"))
    await serving.restart()
    await fed.wait_for_event("inference", "infer_start", times=2)
    assert await predict(inference_endpoint(fed)) == (12.0, 2)
    assert fed.events_of("inference")[before:] == ["restarted", "infer_start"]
    assert len(fed.messages_of(InferReady)) == 2


async def test_a_restarted_agent_without_its_file_waits_for_a_model(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await serving.kill()
    (fed.config.home / "v1.safetensors").unlink()
    serving.start()
    await fed.wait_for_event("inference", "restarted")
    await send_model(fed, InferStart, model_file(fed, 2))
    await fed.wait_for_message(InferReady, times=2)
    assert await predict(inference_endpoint(fed)) == (12.0, 2)


async def test_a_corrupt_file_of_the_served_model_is_ignored(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await serving.kill()
    (fed.client_config(NAME).directory / "serving.json").write_text(
        '{"task": "tin'
    )  # a power failure during the write
    serving.start()
    await fed.wait_for_event("inference", "restarted")
    await send_model(fed, InferStart, model_file(fed, 2))
    await fed.wait_for_message(InferReady, times=2)


async def test_an_agent_killed_during_a_swap_restarts_empty(fed: FederationHarness, consumers: None) -> None:
    device = fed.client_config(NAME)
    bus = await fed.connect_as("inference", NAME)
    async with LifecycleStore.open(bus, device.open_outbox("inference")) as lifecycles:
        lifecycle = await lifecycles.load(INFERENCE, InferenceData(task=TASK, client=NAME))
        await lifecycle.create()
        await lifecycle.transition(InferenceEvent.INFER_START)
        await lifecycle.transition(InferenceEvent.INFER_UPDATE)
    async with fed.run_agent(make_agent(device)):
        assert (await fed.wait_for_event("inference", "restarted")).source == "updating"
        await send_model(fed, InferStart, model_file(fed, 2))
        await fed.wait_for_message(InferReady)


async def test_a_port_in_use_is_reported(fed: FederationHarness, serving: RunningAgent) -> None:
    port = int(inference_endpoint(fed).rpartition(":")[2])
    with pytest.raises(InferenceBindError, match="Choose another port"):
        await make_agent(fed.client_config("c2"), port=port)(asyncio.Event())


# --- without the bus --------------------------------------------------------------------------------------


UNREACHABLE_URL = "nats://127.0.0.1:1"


async def test_an_agent_serves_before_it_connects_to_the_bus(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await serving.stop()
    before, port, urls = len(fed.transitions_of("inference")), unused_port(), [UNREACHABLE_URL]
    async with fed.run_agent(make_agent(fed.client_config(NAME), port=port, nats_urls=urls)):
        url = f"http://127.0.0.1:{port}"
        await eventually(lambda: responds(url))
        assert await predict(url) == (6.0, 1)
        urls.append(fed.config.nats_url)
        await fed.wait_for_event("inference", "infer_start", times=2)
        assert fed.events_of("inference")[before:] == ["restarted", "infer_start"]
        await send_model(fed, InferUpdate, model_file(fed, 2))
        await fed.wait_for_message(InferReady, times=2)
        assert await predict(url) == (12.0, 2)


async def test_a_new_device_without_the_bus_is_not_ready(fed: FederationHarness) -> None:
    port = unused_port()
    async with fed.run_agent(make_agent(fed.client_config(NAME), port=port, nats_urls=[UNREACHABLE_URL])):
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


# --- requests over NATS -----------------------------------------------------------------------------------


async def test_predictions_can_be_requested_over_nats(fed: FederationHarness, serving: RunningAgent) -> None:
    """Without an envelope, as `nats req fedbus.test.local.c1.tiny.predict '{"inputs": [[1, 2, 3]]}'` does."""
    body = json.loads((await request_raw(fed, b'{"inputs": [[1, 2, 3]]}')).data)
    assert (body["outputs"], body["model_version"]) == ([6.0], 1)
    assert isinstance(body["ids"][0], int)


async def test_an_invalid_request_over_nats_is_answered_with_its_error(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    reply = await request_raw(fed, b'{"inputs": []}')
    assert reply.headers is not None
    assert reply.headers["Nats-Service-Error-Code"] == "400"
    assert "at least one sample" in reply.headers["Nats-Service-Error"]
    assert json.loads(reply.data)["error"] == reply.headers["Nats-Service-Error"]


async def test_the_prediction_service_is_listed_by_nats_micro(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    async with plain_nats(fed) as client:
        info = json.loads((await client.request("$SRV.INFO.fedbus-predict", b"", timeout=5)).data)
    assert info["metadata"] == {"task": TASK, "federation": "test", "owner": NAME}
    assert [endpoint["subject"] for endpoint in info["endpoints"]] == ["fedbus.test.local.c1.tiny.predict"]


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


# --- phases of a swap ---------------------------------------------------------------------------------------


@asynccontextmanager
async def serve_with(fed: FederationHarness, **table: Any) -> AsyncIterator[str]:
    """Run an inference agent with version 1 and the serving *table*; yield its URL."""
    async with fed.run_agent(make_agent(fed.client_config(NAME), **table)):
        await send_model(fed, InferStart, model_file(fed, 1))
        yield (await fed.wait_for_message(InferReady)).endpoint  # its transition comes from another stream


@asynccontextmanager
async def send_predictions(url: str, *inputs: float) -> AsyncIterator[list[tuple[float, int]]]:
    """Send predictions continuously; yield the list of outputs and versions."""
    predictions, stop = list[tuple[float, int]](), asyncio.Event()

    async def predict_until_stopped() -> None:
        while not stop.is_set():
            predictions.append(await predict(url, *inputs))

    async with asyncio.TaskGroup() as group:
        group.create_task(predict_until_stopped())
        try:
            yield predictions
        finally:
            stop.set()


async def test_an_event_that_nats_rejects_is_dropped(fed: FederationHarness) -> None:
    """One body is too large for all streams, the other for this stream; neither stops the queue."""
    events, stream = EventQueue(), events_stream(fed.config.federation)
    publisher = await fed.connect_as("inference", NAME)
    for reason in ("x" * (MAX_EVENT_BYTES + 1), "y" * 2000):
        events.enqueue(CapturePaused(task=TASK, client=NAME, reason=reason))
    events.enqueue(CaptureResumed(task=TASK, client=NAME))
    client = await nats_connect(fed.config.nats_url)
    try:
        config = (await client.jetstream().stream_info(stream)).config
        await client.jetstream().update_stream(replace(config, max_msg_size=1500))
    finally:
        await client.close()
    publishing = asyncio.create_task(events.drain_to(publisher))
    await fed.wait_for_message(CaptureResumed)
    assert not publishing.done()
    assert not fed.messages_of(CapturePaused)
    publishing.cancel()


async def test_each_phase_of_a_swap_publishes_its_figures(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    url = fed.messages_of(InferReady)[0].endpoint
    for _ in range(3):
        await predict(url)
    await eventually(lambda: count_rows(fed.client_config(NAME).captured_path()) == 3)
    await send_model(fed, InferUpdate, model_file(fed, 2))
    prepared = await fed.wait_for_message(ModelPrepared, times=2)
    assert (prepared.model.version, prepared.serving, prepared.probed, prepared.replayed) == (2, 1, 2, 3)
    committed = await fed.wait_for_message(ModelCommitted, times=2)
    assert (committed.model.version, committed.replaced) == (2, 1)


async def test_a_model_that_fails_on_captured_inputs_is_refused(
    fed: FederationHarness, serving: RunningAgent
) -> None:
    await predict(fed.messages_of(InferReady)[0].endpoint, 13, 0, 0)
    await eventually(lambda: count_rows(fed.client_config(NAME).captured_path()) == 1)
    await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([100], np.float32)))
    assert "last 1 captured inputs: failed on 13" in (await fed.wait_for_message(InferRefused)).reason
    assert (await fed.wait_for_message(ModelRejected)).step == "load"


async def test_a_model_with_a_lower_holdout_score_is_refused(fed: FederationHarness, consumers: None) -> None:
    async with serve_with(fed, **{"min-holdout": 10}) as url:
        for n in range(100):
            await predict(url, n, 0, 0, labels=[n])  # version 1 predicts these labels
        await eventually(lambda: count_rows(fed.client_config(NAME).captured_path()) == 100)
        await send_model(fed, InferUpdate, model_file(fed, 2))
        assert "labelled samples of this device" in (await fed.wait_for_message(InferRefused)).reason
        rejected = await fed.wait_for_message(ModelRejected)
        assert (rejected.step, rejected.old_score, rejected.serving) == ("holdout", 1.0, 1)
        assert await predict(url) == (6.0, 1)
        await send_model(fed, InferUpdate, model_file(fed, 3, w=np.nextafter([1], [2], dtype=np.float32)))
        prepared = await fed.wait_for_message(ModelPrepared, times=2)
        assert [prepared.old_score, prepared.new_score] == pytest.approx([1.0, 1.0])
        assert prepared.holdout >= 10


async def test_in_shadow_users_get_the_answers_of_the_current_model(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed, **{"shadow-samples": 20}) as url, send_predictions(url) as predictions:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        shadowed = await fed.wait_for_message(ModelShadowed)
        assert shadowed.beside.samples >= 20
        assert shadowed.beside.disagreement == 1.0  # all outputs differ: they are twice as large
        assert shadowed.beside.old_ms is not None
        assert shadowed.beside.new_ms is not None
        await fed.wait_for_message(ModelCommitted, times=2)
        assert set(predictions) <= {(6.0, 1), (12.0, 2)}
        assert predictions.count((6.0, 1)) >= 20


async def test_a_shadow_model_that_disagrees_is_refused(fed: FederationHarness, consumers: None) -> None:
    table = {"shadow-samples": 10, "max-disagreement": 0.5}
    async with serve_with(fed, **table) as url, send_predictions(url) as predictions:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        assert (
            "predictions differ from the current model" in (await fed.wait_for_message(InferRefused)).reason
        )
        rejected = await fed.wait_for_message(ModelRejected)
        assert rejected.step == "shadow"
        assert rejected.beside is not None
        assert rejected.beside.disagreement == 1.0
        assert set(predictions) == {(6.0, 1)}


async def test_a_canary_answers_its_share_of_the_requests(fed: FederationHarness, consumers: None) -> None:
    table = {"canary-share": 0.25, "canary-samples": 10}
    async with serve_with(fed, **table) as url, send_predictions(url) as predictions:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        canaried = await fed.wait_for_message(ModelCanaried)
        await fed.wait_for_message(ModelCommitted, times=2)
        first = predictions.index((12.0, 2))
        during = predictions[first : first + 37]
        assert during.count((12.0, 2)) == 10
        assert (canaried.share, canaried.beside.errors) == (0.25, 0)


async def test_a_canary_that_fails_is_refused_and_users_see_no_error(
    fed: FederationHarness, consumers: None
) -> None:
    faulty = {"w": np.array([100], np.float32)}
    table = {"canary-share": 0.5, "canary-samples": 1000}
    async with serve_with(fed, **table) as url:
        await send_model(fed, InferUpdate, model_file(fed, 2, **faulty))
        await fed.wait_for_message(ModelPrepared, times=2)  # the probe and the captured inputs have no 13
        async with send_predictions(url, 13, 0, 0) as predictions:
            assert "failed on 13" in (await fed.wait_for_message(InferRefused)).reason
        rejected = await fed.wait_for_message(ModelRejected)
        assert rejected.step == "canary"
        assert rejected.beside is not None
        assert rejected.beside.errors >= 3
    assert set(predictions) == {(13.0, 1)}


async def test_a_new_model_with_errors_is_rolled_back_in_the_watch(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed) as url:
        await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([100], np.float32)))
        await fed.wait_for_message(InferReady, times=2)
        assert await predict(url) == (600.0, 2)
        async with send_predictions(url, 13, 0, 0) as predictions:
            rolled_back = await fed.wait_for_message(ModelRolledBack)
            assert (rolled_back.model.version, rolled_back.returned_from.version) == (1, 2)
            assert rolled_back.beside.errors >= 3
            assert "failed on 13" in rolled_back.reason
            await fed.wait_for_event("inference", "model_returned")
        assert set(predictions) == {(13.0, 1)}
        assert await predict(url) == (6.0, 1)
        await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([100], np.float32)))
        assert "this device rolled the model back" in (await fed.wait_for_message(InferRefused)).reason
        await send_model(fed, InferUpdate, model_file(fed, 3))
        await fed.wait_for_message(InferReady, times=3)
        assert await predict(url) == (18.0, 3)


async def test_a_rolled_back_model_is_tried_again_after_promotion(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed) as url:
        model = model_file(fed, 2, w=np.array([100], np.float32))
        await send_model(fed, InferUpdate, model, term=7)
        await fed.wait_for_message(InferReady, times=2)
        async with send_predictions(url, 13, 0, 0):
            await fed.wait_for_message(ModelRolledBack)
            await fed.wait_for_event("inference", "model_returned")
        await send_model(fed, InferUpdate, model, term=7)
        assert (
            "try it again, run: fedbus model promote 2" in (await fed.wait_for_message(InferRefused)).reason
        )
        await send_model(fed, InferUpdate, model, term=8)
        reason = (await fed.wait_for_message(InferRefused, times=2)).reason
        assert reason.endswith("captured inputs: failed on 13")


async def test_a_new_model_with_prediction_drift_is_rolled_back(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed, **{"max-answer-psi": 0.5, "min-answers": 20}) as url:
        for n in range(40):
            await predict(url, n % 4, 0, 0)
        await send_model(fed, InferUpdate, model_file(fed, 2, w=np.array([50], np.float32)))
        await fed.wait_for_message(InferReady, times=2)
        for n in range(40):
            await predict(url, n % 4, 0, 0)
        rolled_back = await fed.wait_for_message(ModelRolledBack)
        assert "distribution of predictions differs" in rolled_back.reason
        assert rolled_back.beside.answer_psi is not None
        assert rolled_back.beside.answer_psi > 0.5
        await fed.wait_for_event("inference", "model_returned")


async def test_of_models_requested_during_a_swap_the_newest_is_served(
    fed: FederationHarness, consumers: None
) -> None:
    async with serve_with(fed, **{"shadow-samples": 1, "shadow-s": 60.0}) as url:
        await send_model(fed, InferUpdate, model_file(fed, 2))
        await fed.wait_for_state("inference", "updating")  # until the first prediction ends the shadow phase
        for version in (3, 4, 5):
            await send_model(fed, InferUpdate, model_file(fed, version))
        await eventually(lambda: has_consumed_all(fed))
        await eventually(lambda: is_serving(url, 5))
        await fed.wait_until(
            lambda: fed.messages_of(ModelCommitted)[-1].model.version == 5
        )  # published after it serves
    assert [committed.model.version for committed in fed.messages_of(ModelCommitted)] == [1, 2, 5]


async def has_consumed_all(fed: FederationHarness) -> bool:
    name = consumer_name(NAME, TASK, AgentName.INFERENCE)
    info = await fed.bus._js.consumer_info(stream_for(fed.bus.fed, AgentName.INFERENCE), name)
    return not info.num_pending and not info.num_ack_pending


async def is_serving(url: str, version: int) -> bool:
    return (await predict(url))[1] == version
