"""All agents of a federation in this process; what trains and what builds models are processes of their own."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedbus.app.composition.agents import CLIENT_AGENTS, SERVER_AGENTS, on_device
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import InferenceFacts
from fedbus.contracts.run import RUN, RunFacts, StartRun
from fedbus.learning import weights
from fedbus.stores.models.open import open_store
from support.federation import TASK, AgentAtWork, Federation


@asynccontextmanager
async def server_side(fed: Federation) -> AsyncIterator[dict[AgentName, AgentAtWork]]:
    """The server's three agents, by name; there is a model when the block begins."""
    async with AsyncExitStack() as stack:
        agents = {
            name: await stack.enter_async_context(fed.agent(partial(run, fed.site)))
            for name, run in SERVER_AGENTS.items()
        }
        await fed.reaches("server", "waiting", within_s=60)
        yield agents


@asynccontextmanager
async def client_side(
    fed: Federation, name: str, number: int, of: int
) -> AsyncIterator[dict[AgentName, AgentAtWork]]:
    """The three agents of one client, by name."""
    device = fed.device(name, number, of)
    async with AsyncExitStack() as stack:
        yield {
            agent: await stack.enter_async_context(fed.agent(on_device(agent, device)))
            for agent in CLIENT_AGENTS
        }


@asynccontextmanager
async def whole(fed: Federation, clients: int = 2) -> AsyncIterator[dict[str, dict[AgentName, AgentAtWork]]]:
    """A server and clients ``c1``, ``c2``, …, each of which serves when the block begins."""
    async with AsyncExitStack() as stack:
        everyone = {"server": await stack.enter_async_context(server_side(fed))}
        for number in range(clients):
            name = f"c{number + 1}"
            side = client_side(fed, name, number, clients)
            everyone[name] = await stack.enter_async_context(side)
        for number in range(clients):
            await fed.reaches("client", "serving", f"c{number + 1}.{fed.site.task.id}", within_s=60)
        yield everyone


async def start_run(fed: Federation, **wishes: Any) -> str:
    started = await fed.bus.request(StartRun(task=fed.site.task.id, **wishes))
    run: str = started.run
    return run


async def ended(fed: Federation, run: str, *, within_s: float = 60) -> RunFacts:
    """Wait until *run* is over, and every client serves what it came to."""
    await fed.until(lambda: fed.last("run", run).target in RUN.final, f"the end of {run}", within_s)
    facts = fed.last("run", run).facts
    assert isinstance(facts, RunFacts)
    if facts.model is not None:
        version = facts.model.version
        everyone_serves = f"everyone to serve v{version}"
        await fed.until(
            lambda: set(served(fed).values()) == {version} and settled(fed), everyone_serves, within_s
        )
    return facts


def settled(fed: Federation) -> bool:
    """Whether every client serves and nothing is under way."""
    things = {(one.kind, one.thing) for one in fed.moves if one.kind in ("client", "fl_client", "inference")}
    wanted = {"client": "serving", "fl_client": "waiting", "inference": "serving"}
    return all(fed.last(kind, thing).target == wanted[kind] for kind, thing in things)


def served(fed: Federation) -> dict[str, int]:
    """The version that each client's inference agent serves."""
    last = [fed.last("inference", thing).facts for thing in {one.thing for one in fed.of("inference")}]
    return {
        facts.client: facts.model.version if facts.model else 0
        for facts in last
        if isinstance(facts, InferenceFacts)
    }


async def trained(fed: Federation) -> float:
    """How often the latest model of the tiny task was trained: all its weights are that number."""
    store = open_store(fed.site.store_url, TASK)
    latest = await store.latest()
    assert latest is not None
    arrays = weights.load(Path(await store.path_of(latest.sha256)))
    values = np.concatenate([array.ravel() for array in arrays.values()])
    assert np.ptp(values) == 0, "every weight is trained as often as the others"
    return round(float(values[0]), 3)
