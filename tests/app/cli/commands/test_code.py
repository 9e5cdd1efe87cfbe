"""`fedbus code` with a real nats-server, Git repository and server manager."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import NatsServer
from support.cli import FedbusCli
from support.fake_flower_server import FakeFlowerServer
from support.federation import FED, TASK, TINY_TASK, FederationHarness, RunningAgent, open_federation
from support.followed_repository import create_tiny_repository
from support.git_repositories import CommitSigner, Repository

from fedbus.agents.server_manager.agent import ServerManager
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.client import CLIENT, ClientData
from fedbus.contracts.code import CodeData, CodePublished, CodeReady
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import CodeRepository, open_code

REVISED = {"tiny/__init__.py": "REVISION = 2\n"}


@dataclass
class CodeServer:
    """A running server manager and a command line."""

    fed: FederationHarness
    flower: FakeFlowerServer
    agent: RunningAgent
    fedbus: FedbusCli

    @property
    def facts(self) -> CodeData:
        facts = self.fed.last_transition("code").facts
        assert isinstance(facts, CodeData)
        return facts

    async def create_client(self, name: str, version: str) -> None:
        """A client that the log knows, on *version*."""
        async with LifecycleStore.open(await self.fed.connect_as("client-manager", name)) as lifecycles:
            facts = ClientData(task=TASK, client=name, code_version=version)
            await (await lifecycles.load(CLIENT, facts)).create()

    async def send_code_ready(self, client: str, version: str) -> None:
        result = CodeReady(task=TASK, client=client, code_version=version)
        await self.fed.publish(result, sender="client-manager")


@pytest.fixture
def repository(tmp_path: Path, ada: CommitSigner) -> Repository:
    return create_tiny_repository(tmp_path / "repository", by=ada)


@pytest.fixture
def code(repository: Repository, signers: Path, tmp_path: Path) -> CodeRepository:
    return open_code(f"{repository.url}@main", tmp_path / "server", open_library, signers=signers)


@asynccontextmanager
async def run_server(nats: NatsServer, directory: Path, code: CodeRepository) -> AsyncIterator[CodeServer]:
    """Run the server manager of *code* until it is connected and has a model."""
    async with open_federation(nats.url, directory) as fed:
        flower = FakeFlowerServer(fed)
        await flower.store.prepare()
        first = await code.load_task(await code.fetch_latest())

        async def manage(stop: asyncio.Event) -> None:
            async with fed.config.connect_bus("server-manager") as bus:
                await ServerManager(bus, first, flower.store, code=code).run(stop)

        fedbus = FedbusCli(directory / "person", FEDBUS_NATS_URL=nats.url, FEDBUS_FEDERATION=FED)
        async with flower.serve(), fed.run_agent(manage) as agent:
            await fed.wait_for_message(CodePublished)
            yield CodeServer(fed, flower, agent, fedbus)


@pytest.fixture
async def server(nats: NatsServer, tmp_path: Path, code: CodeRepository) -> AsyncIterator[CodeServer]:
    async with run_server(nats, tmp_path, code) as server:
        yield server


# --- status ----------------------------------------------------------------------------------


async def test_ls_lists_commits_with_states_and_clients(
    server: CodeServer, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    await server.create_client("c1", old)
    await server.create_client("c2", old)
    broken = repository.commit(REVISED, subject="a mistake", by=ada)
    server.flower.check_errors[broken] = "it cannot be imported"
    await server.fedbus("code", "look")
    new = repository.commit({"tiny/__init__.py": "REVISION = 3\n"}, subject="smaller steps", by=ada)
    await server.fedbus("code", "look")

    listed = (await server.fedbus("code", "ls", "--json")).facts
    assert [(one["code_version"], one["where"], one["clients"], one["subject"]) for one in listed] == [
        (new, "candidate", 0, "smaller steps"),
        (broken, "rejected", 0, "a mistake"),
        (old, "current", 2, "the task"),
    ]
    lines = (await server.fedbus("code", "ls")).out.splitlines()
    assert lines[0].split() == ["version", "state", "clients", "committed", "subject", "author"]
    assert lines[3].split()[:3] == [old[:12], "current", "2"]
    assert len((await server.fedbus("code", "ls", "--limit", "1", "--json")).facts) == 1


async def test_status_shows_the_clients_and_the_rollout(
    server: CodeServer, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    await server.create_client("c1", old)
    lines = (await server.fedbus("code", "status")).out.splitlines()
    assert lines[0] == f"{TASK} follows file://{repository.path} main"
    assert lines[1].split() == ["all", "clients", old[:12], "·", "1", "client"]

    new = repository.commit(REVISED, by=ada)
    await server.fedbus("code", "look")
    result = await server.fedbus("code", "status")
    assert f"{new[:12]}, stage 1 of 1 (100%): 0 of 1 clients have it" in result.out
    assert result.out.splitlines()[1].split() == ["other", "clients", old[:12], "·", "1", "client"]
    facts = (await server.fedbus("code", "status", "--json")).facts
    assert (facts["state"], facts["candidate"], facts["clients_on"]) == ("rolling", new, {old: 1})


async def test_a_reason_with_brackets_is_shown_unchanged(
    server: CodeServer, repository: Repository, ada: CommitSigner
) -> None:
    broken = repository.commit(REVISED, by=ada)
    server.flower.check_errors[broken] = "expected [/4, 3] but found [bold]"
    await server.fedbus("code", "look")
    result = await server.fedbus("code", "status")
    assert (result.code, result.err) == (0, "")
    assert f"{broken[:12]}: expected [/4, 3] but found [bold]" in result.out


async def test_look_prints_the_commit_and_what_follows(
    server: CodeServer, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    assert (
        await server.fedbus("code", "look")
    ).out == f"{old[:12]}: nothing new: all clients run {old[:12]}\n"
    new = repository.commit(REVISED, by=ada)
    looked = await server.fedbus("code", "look")  # the regular poll may have found it a moment ago
    assert looked.out.endswith(f"{new[:12]} is being rolled out to 100% of the clients\n")
    unsigned = repository.commit({"tiny/__init__.py": "REVISION = 3\n"})
    assert "rejected: it is not signed" in (await server.fedbus("code", "look")).out
    assert unsigned in server.facts.rejected


async def test_an_unavailable_repository_still_lists_commits(
    server: CodeServer, repository: Repository
) -> None:
    assert (await server.fedbus("code", "ls")).code == 0
    repository.path.rename(repository.path.with_name("elsewhere"))
    result = await server.fedbus("code", "ls")
    assert result.code == 0
    assert "check that it exists" in result.err
    assert "the task" in result.out
    assert (await server.fedbus("code", "look")).code == 1
    await server.fed.wait_for_event("code", "following_held_up")
    assert "no new code: cannot use" in (await server.fedbus("code", "status")).out.replace("\n", " ")


# --- rollout and revert ----------------------------------------------------------------------


async def test_a_manual_rollout_uses_the_given_stages(
    server: CodeServer, repository: Repository, ada: CommitSigner
) -> None:
    await server.create_client("c1", repository.head)
    repository.git("checkout", "--quiet", "-b", "later")
    new = repository.commit(REVISED, by=ada)
    repository.git("update-ref", "refs/heads/main", new)
    result = await server.fedbus("code", "rollout", new[:8], "--stage", "50%", "--stage", "100%")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"rolling out {new[:12]} to 50%, then 100%. See: fedbus code status\n"
    assert server.facts.stages == ("50%", "100%")


async def test_revert_cancels_a_rollout_with_the_reason(
    server: CodeServer, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    await server.create_client("c1", old)
    new = repository.commit(REVISED, by=ada)
    await server.fedbus("code", "look")
    result = await server.fedbus("code", "revert", "--reason", "users complain")
    assert result.out == f"deploying {old[:12]} to all clients. See: fedbus code status\n"
    assert server.facts.rejected == {new: "users complain"}
    assert (await server.fedbus("code", "status")).out.count("users complain") == 2


async def test_a_refused_command_is_one_line_and_an_exit_code(
    server: CodeServer, repository: Repository
) -> None:
    nothing_before = await server.fedbus("code", "revert")
    assert nothing_before.code == 1
    assert f"there is no version before {repository.head[:12]}" in nothing_before.err
    unknown = await server.fedbus("code", "rollout", "v9.9")
    assert unknown.code == 1
    assert "no commit, tag or branch with this name" in unknown.err
    no_stage = await server.fedbus("code", "rollout", "main", "--stage", "half")
    assert (no_stage.code, no_stage.err) == (
        2,
        "fedbus: 'half' is not a stage. Use a percentage such as 10%, or labels such as site=lab,board=jetson\n",
    )
    already = await server.fedbus("code", "rollout", "main")
    assert (already.code, already.err.count("\n")) == (1, 1)
    assert "every client is on" in already.err
    other = await server.fedbus("code", "status", "--task", "mnist")
    assert (other.code, other.err) == (5, "fedbus: federation test has no task mnist. Choose one of: tiny\n")


# --- no repository, no server --------------------------------------------------------------------


async def test_a_task_from_a_directory_has_no_commits(nats: NatsServer, tmp_path: Path) -> None:
    directory = tmp_path / "task"
    shutil.copytree(TINY_TASK, directory, ignore=shutil.ignore_patterns("__pycache__"))
    fixed = open_code(str(directory), tmp_path / "server", open_library)
    async with run_server(nats, tmp_path, fixed) as server:
        listed = await server.fedbus("code", "ls")
        assert (listed.code, listed.out) == (0, "")
        assert "is a directory" in listed.err
        assert (await server.fedbus("code", "ls", "--json")).facts == []
        status = await server.fedbus("code", "status")
        assert status.out.startswith(f"{TASK} does not follow a repository; its code is the directory ")
        looked = await server.fedbus("code", "look")
        assert looked.code == 1
        assert "start the server with --task git+URL" in looked.err


async def test_without_a_server_the_error_names_the_task(nats: NatsServer, tmp_path: Path) -> None:
    fedbus = FedbusCli(tmp_path, FEDBUS_NATS_URL=nats.url)
    result = await fedbus("code", "status")
    assert result.code == 5
    assert result.err.count("\n") == 1
