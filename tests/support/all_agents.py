"""All agents of a federation in this process; training and model initialisation run in child processes."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedbus.app.composition.agents import CLIENT_AGENTS, SERVER_AGENTS, client_agent
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import InferenceData
from fedbus.contracts.run import RUN, RunData, StartRun
from fedbus.learning import weights
from fedbus.stores.models.open import open_model_store
from support.federation import TASK, FederationHarness, RunningAgent


@asynccontextmanager
async def run_server_side(fed: FederationHarness) -> AsyncIterator[dict[AgentName, RunningAgent]]:
    """Run the agents of the server side, by name, until the block ends; wait first until there is a model."""
    async with AsyncExitStack() as stack:
        agents = {
            name: await stack.enter_async_context(fed.run_agent(partial(run, fed.config)))
            for name, run in SERVER_AGENTS.items()
        }
        await fed.wait_for_state("server", "waiting", within_s=60)
        yield agents


@asynccontextmanager
async def run_client_side(
    fed: FederationHarness, name: str, number: int, of: int
) -> AsyncIterator[dict[AgentName, RunningAgent]]:
    """Run the agents of one client, by name, until the block ends."""
    device = fed.client_config(name, number, of)
    async with AsyncExitStack() as stack:
        yield {
            agent: await stack.enter_async_context(fed.run_agent(client_agent(agent, device)))
            for agent in CLIENT_AGENTS
        }


@asynccontextmanager
async def run_all_agents(
    fed: FederationHarness, clients: int = 2
) -> AsyncIterator[dict[str, dict[AgentName, RunningAgent]]]:
    """Run a server and clients ``c1``, ``c2``, … until the block ends; wait first until each client serves."""
    async with AsyncExitStack() as stack:
        everyone = {"server": await stack.enter_async_context(run_server_side(fed))}
        for number in range(clients):
            name = f"c{number + 1}"
            side = run_client_side(fed, name, number, clients)
            everyone[name] = await stack.enter_async_context(side)
        for number in range(clients):
            await fed.wait_for_state("client", "serving", f"c{number + 1}.{fed.config.task.id}", within_s=60)
        yield everyone


async def start_run(fed: FederationHarness, **wishes: Any) -> str:
    started = await fed.bus.request(StartRun(task=fed.config.task.id, **wishes), timeout_s=60)
    run: str = started.run
    return run


async def wait_for_run_end(fed: FederationHarness, run: str, *, within_s: float = 60) -> RunData:
    """Wait until *run* has ended, and every client serves its model."""
    await fed.wait_until(
        lambda: fed.last_transition("run", run).target in RUN.final, f"the end of {run}", within_s
    )
    facts = fed.last_transition("run", run).facts
    assert isinstance(facts, RunData)
    if facts.model is not None:
        version = facts.model.version
        everyone_serves = f"everyone to serve v{version}"
        await fed.wait_until(
            lambda: set(served_versions(fed).values()) == {version} and is_settled(fed),
            everyone_serves,
            within_s,
        )
    return facts


def is_settled(fed: FederationHarness) -> bool:
    """Whether every client serves, and no training or model update is in progress."""
    things = {
        (one.kind, one.key) for one in fed.transitions if one.kind in ("client", "fl_client", "inference")
    }
    wanted = {"client": "serving", "fl_client": "waiting", "inference": "serving"}
    return all(fed.last_transition(kind, thing).target == wanted[kind] for kind, thing in things)


def served_versions(fed: FederationHarness) -> dict[str, int]:
    """The version that the inference agent of each client serves."""
    last = [
        fed.last_transition("inference", thing).facts
        for thing in {one.key for one in fed.transitions_of("inference")}
    ]
    return {
        facts.client: facts.model.version if facts.model else 0
        for facts in last
        if isinstance(facts, InferenceData)
    }


async def training_count(fed: FederationHarness) -> float:
    """How often the latest model of the tiny task was trained, which is the value of all its weights."""
    store = open_model_store(fed.config.store_url, TASK)
    latest = await store.read_latest()
    assert latest is not None
    arrays = weights.load(Path(await store.local_path(latest.sha256)))
    values = np.concatenate([array.ravel() for array in arrays.values()])
    assert np.ptp(values) == 0, "the weights differ"
    return round(float(values[0]), 3)
