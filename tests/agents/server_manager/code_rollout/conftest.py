"""A repository of a task, the server manager that follows it, and simulated peers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.fake_peers import FakePeers, RolloutServer
from support.federation import FederationHarness
from support.followed_repository import create_tiny_repository
from support.git_repositories import CommitSigner, Repository

from fedbus.agents.server_manager.agent import ServerManager
from fedbus.contracts.code import CodePublished
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import CodeRepository, open_code


@pytest.fixture
async def peers(fed: FederationHarness) -> AsyncIterator[FakePeers]:
    peers = FakePeers(fed)
    await peers.store.prepare()
    async with peers.serve_all():
        yield peers


@pytest.fixture
def repository(tmp_path: Path, ada: CommitSigner) -> Repository:
    return create_tiny_repository(tmp_path / "repository", by=ada)


@pytest.fixture
def code(repository: Repository, signers: Path, tmp_path: Path) -> CodeRepository:
    return open_code(f"{repository.url}@main", tmp_path / "home", open_library, signers=signers)


@pytest.fixture
async def server(
    fed: FederationHarness, peers: FakePeers, code: CodeRepository
) -> AsyncIterator[RolloutServer]:
    first = await code.load_task(await code.fetch_latest())

    async def manage(stop: asyncio.Event) -> None:
        async with fed.config.connect_bus("server-manager") as bus:
            await ServerManager(bus, first, peers.store, code=code).run(stop)

    async with fed.run_agent(manage) as agent:
        await fed.wait_for_message(CodePublished)
        yield RolloutServer(fed, code, agent)
