"""A real federation under a profile: delays, latency and interruptions between the agents and nats-server."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.all_agents import run_server_side, start_run, wait_for_run_end
from support.federation import TASK, FederationHarness
from support.process_federation import run_process_federation

from fedbus.app.composition.agents import CLIENT_AGENTS, client_agent
from fedbus.app.composition.emulated_device import emulate_device
from fedbus.simulation.profiles.schema import Profile

CLIENTS = ("c1", "c2")

pytestmark = pytest.mark.slow


@asynccontextmanager
async def run_under_profile(fed: FederationHarness, groups: Mapping[str, Any]) -> AsyncIterator[None]:
    """Run the server side, and each client behind a proxy with its conditions; wait first until each client serves."""
    profile = Profile.model_validate({"groups": groups})
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(run_server_side(fed))
        for number, name in enumerate(CLIENTS):
            device = emulate_device(fed.config.nats_url, name, profile)
            config = device.apply_to(fed.client_config(name, number, len(CLIENTS)))
            await stack.enter_async_context(device.run_proxy())
            for agent in CLIENT_AGENTS:
                await stack.enter_async_context(fed.run_agent(partial(run_agent, agent, config)))
        for name in CLIENTS:
            await fed.wait_for_state("client", "serving", f"{name}.{TASK}", within_s=60)
        yield


async def run_agent(agent: Any, config: Any, stop: asyncio.Event) -> None:
    await client_agent(agent, config)(stop)


async def test_delay_makes_each_round_longer(fed: FederationHarness) -> None:
    groups = {"delayed": {"clients": ["c1"], "delay": 1.0}, "others": {}}
    async with run_under_profile(fed, groups):
        run = await wait_for_run_end(fed, await start_run(fed, quorum=2, rounds=2))
    assert run.rounds[-1].loss == pytest.approx(98)
    for result in run.rounds[1:]:
        assert 1.0 <= result.seconds < 10.0
        assert result.transfer_s["c1"] >= 1.0
        assert max(result.train_s["c1"], result.transfer_s["c2"]) < 1.0


async def test_slow_device_trains_longer(fed: FederationHarness) -> None:
    groups = {"slow": {"clients": ["c2"], "training": {"seconds": 0.8}}, "others": {}}
    async with run_under_profile(fed, groups):
        run = await wait_for_run_end(fed, await start_run(fed, quorum=2, rounds=1))
    assert run.rounds[-1].train_s["c2"] == pytest.approx(0.8, abs=0.3)
    assert run.rounds[-1].train_s["c1"] < 0.8


async def test_interruptions_do_not_end_the_run(fed: FederationHarness) -> None:
    groups = {
        "mobile": {
            "latency": {"distribution": "uniform", "min-s": 0.005, "max-s": 0.02},
            "bandwidth": {"down-mbit-s": 50, "up-mbit-s": 20},
            "loss": {"probability": 0.05, "retransmit-s": 0.05},
            "disconnections": {
                "every-s": 3,
                "duration": {"distribution": "uniform", "min-s": 0.1, "max-s": 0.5},
            },
        }
    }
    async with run_under_profile(fed, groups):
        begun = await start_run(fed, quorum=2, rounds=4, config={"pause-s": 1.0})
        run = await wait_for_run_end(fed, begun, within_s=120)
    assert [result.round for result in run.rounds] == [0, 1, 2, 3, 4]
    assert all(set(result.participants) == set(CLIENTS) for result in run.rounds[1:])
    assert run.rounds[-1].loss == pytest.approx(96)


async def test_real_processes_run_under_a_profile(tmp_path: Path) -> None:
    profile = ("--profile", "delay-study:delay-s=1", "--profile-group", "delayed", "--profile-seed", "0")
    options = ("--rounds", "2", "--quorum", "2")
    async with run_process_federation(
        tmp_path, options, clients=2, client_options={"c1": profile, "c2": profile}
    ) as federation:
        run = await federation.start_run()
        await federation.wait_until(lambda: federation.has_ended(run))
        facts = federation.run_facts(run)
        assert [1.0 <= result.seconds < 10.0 for result in facts.rounds] == [False, True, True]
        assert federation.stack.restarts == {}
