"""A federation with credentials and TLS, in which each agent has only the permissions of its role."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import eventually
from support.federation import FED, TASK, RunningAgent, tiny_task
from support.ports import free_port
from support.trusted_bus import ConfiguredNatsServer, TrustedBus, trusted_bus

from fedbus.app.composition.agents import CLIENT_AGENTS, SERVER_AGENTS, AgentConfig, ClientConfig
from fedbus.app.provision.nats_config import ServerLocation
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.credentials import BusAccess
from fedbus.bus.errors import FederationNotFound
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.permissions import Role
from fedbus.contracts.run import RunData, StartRun
from fedbus.contracts.server import ServerData
from fedbus.contracts.subjects import USERS
from fedbus.contracts.transition import Transition


class TrustedFederation:
    """All agents of a federation on a bus with authentication, each with its own credentials."""

    def __init__(self, bus: TrustedBus, directory: Path) -> None:
        self.bus = bus
        self.agent_config = AgentConfig(bus.url, FED, directory / "home", tiny_task(directory))
        self.agents: list[RunningAgent] = []

    def start_server(self) -> None:
        for name, run in SERVER_AGENTS.items():
            self._start(partial(run, replace(self.agent_config, access=self.bus.access_for(Role(name)))))

    def start_client(self, name: str, number: int, *, url: str = "", access: BusAccess | None = None) -> None:
        site = replace(
            self.agent_config,
            access=access or self.bus.access_for(name),
            home=self.agent_config.home / name,
            nats_url=url or self.bus.url,
        )
        device = ClientConfig(site, client_id(name), {"partition-id": number, "num-partitions": 2})
        for run in CLIENT_AGENTS.values():
            self._start(partial(run, device))

    def _start(self, run: "partial[Coroutine[Any, Any, None]]") -> None:
        agent = RunningAgent(run)
        agent.start()
        self.agents.append(agent)

    async def stop(self) -> None:
        await asyncio.gather(*(agent.stop() for agent in self.agents if not agent.is_awaited))

    def raise_agent_errors(self) -> None:
        for error in filter(None, (agent.error for agent in self.agents)):
            raise AssertionError("an agent failed") from error


@pytest.fixture
async def trusted_federation(tmp_path: Path) -> AsyncIterator[TrustedFederation]:
    async with trusted_bus(tmp_path) as bus:
        trusted_federation = TrustedFederation(bus, tmp_path)
        try:
            yield trusted_federation
        finally:
            await trusted_federation.stop()


async def client_transitions(user: Bus) -> list[Transition]:
    try:
        return await user.current_states("client")
    except FederationNotFound:  # the server side has not created the streams yet
        return []


async def complete_run(trusted_federation: TrustedFederation, user: Bus) -> None:
    """Wait until both clients serve, start a run, and wait until both serve its model."""

    async def serving() -> bool:
        trusted_federation.raise_agent_errors()
        return [one.target for one in await client_transitions(user)] == ["serving", "serving"]

    await eventually(serving, within_s=60)
    started = await user.request(StartRun(task=TASK))

    async def finished() -> bool:
        trusted_federation.raise_agent_errors()
        last = (await user.current_states("run", started.run))[-1]
        assert isinstance(last.facts, RunData)
        return last.target == "finished"

    await eventually(finished, within_s=90)

    async def served() -> bool:
        trusted_federation.raise_agent_errors()
        versions = {getattr(one.facts, "model").version for one in await user.current_states("inference")}  # noqa: B009
        return versions == {2}

    await eventually(served, within_s=60)
    last = await user.current_states("server")
    assert isinstance(last[0].facts, ServerData)
    assert last[0].facts.trainings > 0
    assert last[0].facts.failures == 0


async def test_a_run_completes_with_the_permissions_of_each_role(
    trusted_federation: TrustedFederation, capfd: pytest.CaptureFixture[str]
) -> None:
    trusted_federation.start_server()
    trusted_federation.start_client("c1", 0)
    trusted_federation.start_client("c2", 1)
    access = trusted_federation.bus.access_for(Role.USER)
    async with Bus.connect(trusted_federation.bus.url, Identity(FED, "cli", USERS), access=access) as user:
        await complete_run(trusted_federation, user)
        assert {
            name: messages for name, messages in (await user.list_streams() or {}).items() if "DEAD" in name
        } == {"FEDBUS_test_DEAD": 0}
    assert "Permission denied by NATS" not in capfd.readouterr().out
    assert "Violation" not in trusted_federation.bus.server.log.read_text()


async def test_a_restarted_client_continues_from_its_last_state(
    trusted_federation: TrustedFederation,
) -> None:
    trusted_federation.start_server()
    trusted_federation.start_client("c1", 0)
    access = trusted_federation.bus.access_for(Role.USER)
    async with Bus.connect(trusted_federation.bus.url, Identity(FED, "cli", USERS), access=access) as user:

        async def transitions() -> list[tuple[str, str]]:
            trusted_federation.raise_agent_errors()
            return [(one.target, one.event) for one in await client_transitions(user)]

        async def serves() -> bool:
            return [state for state, _ in await transitions()] == ["serving"]

        await eventually(serves, within_s=60)
        for agent in trusted_federation.agents[len(SERVER_AGENTS) :]:
            await agent.restart()
        await eventually(serves, within_s=60)


async def test_a_run_completes_with_clients_behind_a_leaf_node(
    trusted_federation: TrustedFederation, tmp_path: Path
) -> None:
    """The clients connect only to the leaf node, which makes one outbound connection."""
    bus, folder, port = trusted_federation.bus, tmp_path / "lab", free_port()
    place = ServerLocation(folder, port, listen="127.0.0.1")
    kits = {name: bus.access_for(name) for name in ("c1", "c2")}
    bus.federation.write_site("lab", list(kits), [TASK], folder, place, hosts=["localhost"], days=30)
    leaf = ConfiguredNatsServer(folder / "leaf.conf", port)
    await leaf.start()
    try:
        trusted_federation.start_server()
        for number, (name, access) in enumerate(kits.items()):
            trusted_federation.start_client(name, number, url=f"tls://localhost:{port}", access=access)
        user_access = bus.access_for(Role.USER)
        async with Bus.connect(bus.url, Identity(FED, "cli", USERS), access=user_access) as user:
            await complete_run(trusted_federation, user)
        assert "Violation" not in leaf.log.read_text()
        assert "Violation" not in bus.server.log.read_text()
        access = bus.access_for(Role.SERVER_MANAGER)
        async with bus.connect(access, inbox="_INBOX.server.server-manager") as (server, _):
            consumers = await server.jetstream().consumers_info("FEDBUS_test_EVENTS")
        assert {one.name: one.num_redelivered for one in consumers if one.num_redelivered} == {}
        await trusted_federation.stop()
        trusted_federation.agents.clear()
    finally:
        await leaf.stop()
