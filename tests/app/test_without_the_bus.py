"""A device that has served before predicts without a connection to NATS."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from support import eventually
from support.federation import FED, TASK, tiny_task
from support.ports import free_port

from fedbus.agents.inference.agent import SERVED_MODEL_FILE
from fedbus.app.composition.agents import CLIENT_AGENTS, AgentConfig, ClientConfig, client_agent, run_together
from fedbus.bus.errors import BusUnreachable
from fedbus.contracts.client import InferStart
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.model import ModelRef
from fedbus.learning import weights

UNREACHABLE_URL = "nats://127.0.0.1:1"


def make_config(directory: Path, *, port: int = 0) -> ClientConfig:
    config = AgentConfig(UNREACHABLE_URL, FED, directory / "home", tiny_task(directory))
    return ClientConfig(config, client_id("c1"), {"partition-id": 0, "num-partitions": 1}, port=port)


def all_agents(device: ClientConfig) -> dict[str, Any]:
    return {name: client_agent(name, device) for name in CLIENT_AGENTS}


def store_served_model(device: ClientConfig) -> None:
    """Write the files of a device that served a model when it stopped."""
    device.directory.mkdir(parents=True)
    path = device.directory / "1.safetensors"
    arrays = {"weight": np.ones((4, 3), np.float32), "bias": np.arange(4, dtype=np.float32)}
    model = ModelRef(**weights.save(arrays, path).model_dump(), version=1)
    served = InferStart(task=TASK, client="c1", model=model, path=str(path))
    (device.directory / SERVED_MODEL_FILE).write_text(served.model_dump_json())


async def test_a_device_that_has_served_predicts_without_the_bus(tmp_path: Path) -> None:
    port, stop = free_port(), asyncio.Event()
    device = make_config(tmp_path, port=port)
    store_served_model(device)
    url = f"http://127.0.0.1:{port}"
    async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as session:

        async def ready() -> bool:
            try:
                async with session.get(f"{url}/ready") as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        agents = group.create_task(run_together(all_agents(device), stop))
        await eventually(ready)
        body = {"inputs": [[1.0, 2.0, 3.0]]}
        async with session.post(f"{url}/predict", json=body) as response:
            assert (await response.json())["outputs"] == [3]
        assert not agents.done()
        stop.set()
        async with asyncio.timeout(20):
            await agents


async def test_a_new_device_without_the_bus_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as failed:
        await run_together(all_agents(make_config(tmp_path)), asyncio.Event())
    assert failed.group_contains(BusUnreachable)
