"""The inference agent as its clients see it: models over the bus, predictions over HTTP and NATS."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
import pytest
from nats import connect as nats_connect
from nats.aio.client import Client
from nats.aio.msg import Msg
from support import eventually
from support.federation import TASK, FederationHarness, RunningAgent
from support.inference_agent import (
    NAME,
    Array,
    get_json,
    inference_endpoint,
    make_agent,
    model_file,
    predict,
    send_model,
)
from support.ports import free_port

from fedbus.agents.inference.http_server import InferenceBindError
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import (
    INFERENCE,
    InferenceData,
    InferenceEvent,
    InferReady,
    InferRefused,
    InferStart,
    InferUpdate,
)


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
    await fed.wait_for_event("inference", "model_loaded")  # transitions come from another stream
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
    await fed.wait_for_event("inference", "load_refused")  # transitions come from another stream
    assert fed.events_of("inference")[2:] == ["infer_update", "load_refused"]
    await send_model(fed, InferUpdate, model_file(fed, 3))
    await fed.wait_for_message(InferReady, times=2)
    assert await predict(inference_endpoint(fed)) == (18.0, 3)


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
    before, port, urls = len(fed.transitions_of("inference")), free_port(), [UNREACHABLE_URL]
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
    port = free_port()
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
        info = json.loads((await client.request("$SRV.INFO.fedbus-predict", b"", timeout=30)).data)
    assert info["metadata"] == {"task": TASK, "federation": "test", "owner": NAME}
    assert [endpoint["subject"] for endpoint in info["endpoints"]] == ["fedbus.test.local.c1.tiny.predict"]


@asynccontextmanager
async def plain_nats(fed: FederationHarness) -> AsyncIterator[Client]:
    client = await nats_connect(fed.config.nats_url, connect_timeout=30)
    try:
        yield client
    finally:
        await client.close()


async def request_raw(fed: FederationHarness, content: bytes) -> Msg:
    async with plain_nats(fed) as client:
        return await client.request("fedbus.test.local.c1.tiny.predict", content, timeout=30)
