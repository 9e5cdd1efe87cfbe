"""A repository of a task, the server manager that follows it, and simulated peers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.federation import Federation
from support.followed import tiny_repository
from support.repositories import Repository, Signer
from support.rollout import Others, Server

from fedbus.agents.server_manager.agent import ServerManager
from fedbus.contracts.code import CodePublished
from fedbus.stores.code.open import CodeRepository, open_code


@pytest.fixture
async def others(fed: Federation) -> AsyncIterator[Others]:
    others = Others(fed)
    await others.store.prepare()
    async with others.there():
        yield others


@pytest.fixture
def repository(tmp_path: Path, ada: Signer) -> Repository:
    return tiny_repository(tmp_path / "repository", by=ada)


@pytest.fixture
def code(repository: Repository, signers: Path, tmp_path: Path) -> CodeRepository:
    return open_code(f"{repository.url}@main", tmp_path / "home", signers=signers)


@pytest.fixture
async def server(fed: Federation, others: Others, code: CodeRepository) -> AsyncIterator[Server]:
    first = await code.task_at(await code.newest())

    async def manage(stop: asyncio.Event) -> None:
        async with fed.site.bus("server-manager") as bus:
            await ServerManager(bus, first, others.store, code=code).run(stop)

    async with fed.agent(manage) as agent:
        await fed.hears(CodePublished)
        yield Server(fed, code, agent)
