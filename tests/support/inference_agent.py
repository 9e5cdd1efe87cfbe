"""An inference agent with a model without torch, and what its client manager and its users send."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from fedbus.agents.inference.agent import InferenceAgent
from fedbus.agents.inference.event_queue import EventQueue
from fedbus.agents.inference.http_server import InferenceServer
from fedbus.agents.inference.offline_evaluation import OfflineEvaluation
from fedbus.app.composition.agents import ClientConfig
from fedbus.contracts.client import InferenceData, InferReady, InferStart
from fedbus.contracts.model import ModelRef
from fedbus.contracts.task.serving import ServingTable
from fedbus.learning import weights
from fedbus.learning.predictor import ModelNotServed, ModelRefused
from fedbus.stores.captured.store import CapturedData
from support.federation import TASK, FederationHarness

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


async def get_json(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.json()


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
