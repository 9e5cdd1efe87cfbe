"""Three tasks on the same devices: separate lifecycles, models and data; a device trains one task at a time."""

import re
import shutil
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from support.federation import TINY_TASK, FederationHarness

from fedbus.app.composition.agents import CLIENT_AGENTS, SERVER_AGENTS, ClientConfig
from fedbus.contracts.client import ClientDeclined, InferenceData
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.run import RunState, StartRun
from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.models.open import open_model_store
from fedbus.stores.tasks.task_directory import read_task

TASKS = ("tiny", "small", "little")
CLIENTS = ("c1", "c2")


def tasks(directory: Path) -> list[Task]:
    """Copy the tiny task three times, each with its own package and id."""
    copies = []
    for name in TASKS:
        shutil.copytree(TINY_TASK, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        if name != "tiny":
            (directory / name / "tiny").rename(directory / name / name)
        table = (directory / name / "pyproject.toml").read_text()
        table = re.sub(r'"tiny\.', f'"{name}.', table).replace('task = "tiny"', f'task = "{name}"')
        (directory / name / "pyproject.toml").write_text(table.replace("pause-s = 0.0", "pause-s = 0.3"))
        copies.append(read_task(directory / name, open_library))
    return copies


@pytest.mark.slow
async def test_three_tasks_share_two_devices_one_training_at_a_time(
    fed: FederationHarness, tmp_path: Path
) -> None:
    all_tasks = tasks(tmp_path / "tasks")
    async with AsyncExitStack() as stack:
        await start_all_agents(fed, stack, all_tasks)
        for task in all_tasks:
            await fed.bus.request(StartRun(task=task.id, quorum=2))
        for task in all_tasks:
            ended = await fed.wait_for_state("run", RunState.FINISHED, f"{task.id}-1", within_s=120)
            assert ended.target == RunState.FINISHED
        for task in all_tasks:
            for name in CLIENTS:
                await fed.wait_for_event("inference", "model_loaded", f"{name}.{task.id}", within_s=60)
                await assert_predicts(fed, f"{name}.{task.id}", version=2)
                await fed.wait_for_state("client", "serving", f"{name}.{task.id}", within_s=60)

    assert max_concurrent_trainings(fed) == {"c1": 1, "c2": 1}
    declined = [
        message
        for message in fed.messages_of(ClientDeclined)
        if "this device already trains" in message.reason
    ]
    assert declined, "a device declined because it trained another task"
    for task in all_tasks:
        latest = await open_model_store(fed.config.store_url, task.id).read_latest()
        assert latest is not None
        assert (latest.version, latest.task, set(latest.participants)) == (2, task.id, set(CLIENTS))


async def start_all_agents(fed: FederationHarness, stack: AsyncExitStack, all_tasks: list[Task]) -> None:
    """Run the server side of each task, and both clients in each task."""
    for task in all_tasks:
        for run in SERVER_AGENTS.values():
            await stack.enter_async_context(fed.run_agent(partial(run, replace(fed.config, task=task))))
    for task in all_tasks:
        await fed.wait_for_state("server", "waiting", task.id, within_s=60)
    for number, name in enumerate(CLIENTS):
        for task in all_tasks:
            config = {"partition-id": number, "num-partitions": len(CLIENTS)}
            device = ClientConfig(replace(fed.config, task=task), client_id(name), config)
            for agent in CLIENT_AGENTS.values():
                await stack.enter_async_context(fed.run_agent(partial(agent, device)))
    for key in (f"{name}.{task.id}" for name in CLIENTS for task in all_tasks):
        await fed.wait_for_state("client", "serving", key, within_s=90)


async def assert_predicts(fed: FederationHarness, key: str, *, version: int) -> None:
    """Check that the inference agent of one client in one task serves *version*."""
    facts = fed.last_transition("inference", key).facts
    assert isinstance(facts, InferenceData)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{facts.endpoint}/predict", json={"inputs": [[1, 1, 1]]}) as response,
    ):
        assert (await response.json())["model_version"] == version


def max_concurrent_trainings(fed: FederationHarness) -> dict[str, int]:
    """Return the maximum number of tasks that each client trained at the same time."""
    training: dict[str, set[str]] = {name: set() for name in CLIENTS}
    maximum = dict.fromkeys(CLIENTS, 0)
    for transition in fed.transitions_of("client"):
        client, task = transition.key.split(".")
        (training[client].add if transition.target == "learning" else training[client].discard)(task)
        maximum[client] = max(maximum[client], len(training[client]))
    return maximum
