"""The inference agent, heard from outside: models by the bus, predictions by HTTP."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from support import eventually
from support.federation import TASK, WALKED, AgentAtWork, Federation, arrows_of
from support.whole_module import only_after_the_whole_module

from fedbus.agents.inference import Inference
from fedbus.agents.inference_server import CannotListen, InferenceServer
from fedbus.app.compose import Device
from fedbus.bus.lives import Lives
from fedbus.contracts.catalogue import OF_A_CLIENT
from fedbus.contracts.client import (
    INFERENCE,
    InferenceFacts,
    InferReady,
    InferRefused,
    InferStart,
    InferUpdate,
)
from fedbus.contracts.model import ModelRef
from fedbus.learning import weights
from fedbus.learning.predictor import ModelRefused

NAME = "c1"
Array = np.ndarray[Any, Any]
PROBE = np.ones((2, 3), np.float32)


class Sums:
    """Answers with the sum of a sample, times its weight: a model that needs no torch."""

    input_shape = None

    def __init__(self, path: Path) -> None:
        arrays = weights.load(path)
        if set(arrays) != {"w"}:
            raise ModelRefused(f"the weights are not those of Sums: {sorted(arrays)}")
        self._weight = arrays["w"]

    def predict(self, inputs: Array) -> Array:
        answers: Array = inputs.sum(axis=1) * self._weight
        return answers


def agent_of(device: Device, *, port: int = 0) -> Any:
    async def run(stop: asyncio.Event) -> None:
        async with device.site.bus("inference", device.client) as bus:
            agent = Inference(
                bus,
                device.site.task,
                device.client,
                InferenceServer(),
                load=Sums,
                probe=PROBE,
                outbox=device.outbox("inference"),
                directory=device.directory,
                port=port,
            )
            await agent.run(stop)

    return run


@pytest.fixture
async def enrolled(fed: Federation) -> None:
    for agent in OF_A_CLIENT:
        await fed.bus.enroll(agent, task=TASK, client=NAME)


@pytest.fixture
async def inference(fed: Federation, enrolled: None) -> AsyncIterator[AgentAtWork]:
    """An inference agent without a model."""
    async with fed.agent(agent_of(fed.device(NAME))) as agent:
        await fed.reaches("inference", "empty")
        yield agent


@pytest.fixture
async def serving(fed: Federation, inference: AgentAtWork) -> AgentAtWork:
    """One that serves version 1, whose weight is 1."""
    await say(fed, InferStart, model_file(fed, 1))
    await fed.hears(InferReady)
    return inference


def model_file(fed: Federation, version: int, **arrays: Array) -> tuple[ModelRef, Path]:
    path = fed.site.home / f"v{version}.safetensors"
    artifact = weights.save(arrays or {"w": np.array([version], np.float32)}, path)
    return ModelRef(**artifact.model_dump(), version=version), path


async def say(fed: Federation, word: type[InferStart], model: tuple[ModelRef, Path]) -> None:
    said = word(task=TASK, client=NAME, model=model[0], path=str(model[1]))
    await fed.say(said, by="client-manager")


def endpoint(fed: Federation) -> str:
    facts = fed.last("inference").facts
    assert isinstance(facts, InferenceFacts)
    return facts.endpoint


async def predict(url: str) -> tuple[float, int]:
    """What comes of 1 + 2 + 3, and by which version."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/predict", json={"inputs": [[1, 2, 3]]}) as response,
    ):
        assert response.status == 200, await response.text()
        answer = await response.json()
        return answer["outputs"][0], answer["model_version"]


async def test_the_first_model_is_served_where_the_agent_says(fed: Federation, serving: AgentAtWork) -> None:
    ready = fed.heard(InferReady)[0]
    assert ready.endpoint == endpoint(fed)
    assert await predict(ready.endpoint) == (6.0, 1)
    assert fed.events("inference") == ["started", "infer_start"]


async def test_a_newer_model_takes_the_place_of_the_old(fed: Federation, serving: AgentAtWork) -> None:
    await say(fed, InferUpdate, model_file(fed, 2))
    assert (await fed.hears(InferReady, times=2)).model.version == 2
    assert await predict(endpoint(fed)) == (12.0, 2)
    assert fed.events("inference")[2:] == ["infer_update", "model_loaded"]


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
    fed: Federation, serving: AgentAtWork, arrays: dict[str, Array], reason: str
) -> None:
    bad = model_file(fed, 2, **arrays)
    await say(fed, InferUpdate, bad)
    refused = await fed.hears(InferRefused)
    assert (refused.model, refused.serving) == (bad[0], 1)
    assert re.search(reason, refused.reason)
    assert await predict(endpoint(fed)) == (6.0, 1)
    assert fed.events("inference")[2:] == ["infer_update", "load_refused"]
    await say(fed, InferUpdate, model_file(fed, 3))
    await fed.hears(InferReady, times=2)
    assert await predict(endpoint(fed)) == (18.0, 3)


async def test_where_nothing_serves_a_bad_model_is_refused_and_a_good_one_begins(
    fed: Federation, inference: AgentAtWork
) -> None:
    await say(fed, InferStart, model_file(fed, 1, w=np.array([np.inf], np.float32)))
    assert (await fed.hears(InferRefused)).serving is None
    assert fed.events("inference") == ["started"]
    await say(fed, InferStart, model_file(fed, 2))
    await fed.hears(InferReady)
    assert await predict(endpoint(fed)) == (12.0, 2)


async def test_a_model_that_is_served_already_is_ready_at_once(fed: Federation, serving: AgentAtWork) -> None:
    await say(fed, InferStart, model_file(fed, 1))
    await fed.hears(InferReady, times=2)
    assert fed.events("inference") == ["started", "infer_start"]


async def test_a_file_that_is_gone_is_a_refusal(fed: Federation, serving: AgentAtWork) -> None:
    model, path = model_file(fed, 2)
    path.unlink()
    await say(fed, InferUpdate, (model, path))
    assert "there are no weights at" in (await fed.hears(InferRefused)).reason


async def test_predictions_do_not_stop_for_a_model_that_changes(
    fed: Federation, serving: AgentAtWork
) -> None:
    url, versions, done = endpoint(fed), list[int](), asyncio.Event()

    async def users() -> None:
        while not done.is_set():
            output, version = await predict(url)
            assert output == 6.0 * version
            versions.append(version)

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(users())
        for version in range(2, 12):
            await say(fed, InferUpdate, model_file(fed, version))
            await fed.hears(InferReady, times=version)
        await eventually(lambda: bool(versions) and versions[-1] == 11)
        done.set()
    assert len(set(versions)) > 2


# --- restarts ---------------------------------------------------------------------------------------------


async def test_restarted_it_serves_what_it_served_before_it_is_told_anything(
    fed: Federation, serving: AgentAtWork
) -> None:
    await say(fed, InferUpdate, model_file(fed, 2))
    await fed.hears(InferReady, times=2)
    await fed.happens("inference", "model_loaded")  # events and transitions come by two roads
    before = len(fed.of("inference"))
    await serving.restart()
    await fed.happens("inference", "infer_start", times=2)
    assert await predict(endpoint(fed)) == (12.0, 2)
    assert fed.events("inference")[before:] == ["restarted", "infer_start"]
    assert len(fed.heard(InferReady)) == 2


async def test_restarted_without_its_file_it_waits_to_be_told(fed: Federation, serving: AgentAtWork) -> None:
    await serving.kill()
    (fed.site.home / "v1.safetensors").unlink()
    serving.start()
    await fed.happens("inference", "restarted")
    await say(fed, InferStart, model_file(fed, 2))
    await fed.hears(InferReady, times=2)
    assert await predict(endpoint(fed)) == (12.0, 2)


async def test_a_note_of_the_last_model_that_cannot_be_read_is_let_go(
    fed: Federation, serving: AgentAtWork
) -> None:
    await serving.kill()
    (fed.device(NAME).directory / "serving.json").write_text(
        '{"task": "tin'
    )  # the power went while it was written
    serving.start()
    await fed.happens("inference", "restarted")
    await say(fed, InferStart, model_file(fed, 2))
    await fed.hears(InferReady, times=2)


async def test_killed_while_it_changes_models_it_begins_again(fed: Federation, enrolled: None) -> None:
    device = fed.device(NAME)
    bus = await fed.speaker("inference", NAME)
    async with Lives.open(bus, device.outbox("inference")) as lives:
        life = await lives.of(INFERENCE, InferenceFacts(task=TASK, client=NAME))
        await life.bear("started")
        await life.move("infer_start")
        await life.move("infer_update")
    async with fed.agent(agent_of(device)):
        assert (await fed.happens("inference", "restarted")).source == "updating"
        await say(fed, InferStart, model_file(fed, 2))
        await fed.hears(InferReady)


async def test_a_port_that_is_taken_is_one_clear_line(fed: Federation, serving: AgentAtWork) -> None:
    port = int(endpoint(fed).rpartition(":")[2])
    with pytest.raises(CannotListen, match="choose another port"):
        await agent_of(fed.device("c2"), port=port)(asyncio.Event())


def test_every_arrow_of_inference_was_walked(request: pytest.FixtureRequest) -> None:
    only_after_the_whole_module(request)
    assert arrows_of("inference") - WALKED["inference"] == set()
