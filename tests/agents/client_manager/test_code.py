"""A device and its task's code: from a real repository, checked in a real process; server and inference are played."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.client_side import (
    CLIENT_NAME,
    RUN,
    FakeServer,
    send_infer_ready,
    send_infer_refused,
    wait_for_infer_start,
)
from support.federation import TASK, TINY_TASK, FederationHarness, RunningAgent
from support.repositories import CommitSigner, Repository, make_signer

from fedbus.app.composition.agents import client_manager
from fedbus.contracts.client import ClientData, ClientStart, FinTrain, InferUpdate
from fedbus.contracts.code import CodePlan, CodePublished, CodeReady, CodeRefused
from fedbus.stores.code.open import open_code
from fedbus.stores.models.signing import ModelSigner, TrustedKeys, generate_key


@pytest.fixture
async def repository(fed: FederationHarness, ada: CommitSigner, tmp_path: Path) -> Repository:
    """The tiny task's; the federation's devices follow it."""
    path = tmp_path / "repository"
    shutil.copytree(TINY_TASK, path, ignore=shutil.ignore_patterns("__pycache__"))
    repository = Repository(path)
    repository.git("init", "--quiet", "--initial-branch=main")
    repository.commit(subject="the task", by=ada)
    signers = tmp_path / "allowed_signers"
    signers.write_text(ada.line())
    code = open_code(f"{repository.url}@main", fed.site.home, signers=signers)
    first = await code.task_at(await code.newest())
    fed.site = replace(fed.site, code=code, task=first)
    return repository


@pytest.fixture
async def server(fed: FederationHarness, repository: Repository) -> AsyncIterator[FakeServer]:
    async with FakeServer(fed).serving() as server:
        await server.has(1)
        server.code = CodePlan(code_version=repository.head)
        yield server


@pytest.fixture
async def client(fed: FederationHarness, server: FakeServer) -> AsyncIterator[RunningAgent]:
    """A client that serves."""
    async with fed.agent(lambda stop: client_manager(fed.device(CLIENT_NAME), stop)) as agent:
        await send_infer_ready(fed, await wait_for_infer_start(fed))
        await fed.reaches("client", "serving")
        yield agent


async def publish(fed: FederationHarness, stable: str, candidate: str = "", **more: object) -> None:
    said = {"task": TASK, "code_version": stable, "candidate": candidate, **more}
    await fed.say(CodePublished.model_validate(said), by="server-manager")


def version_of(fed: FederationHarness) -> str:
    facts = fed.last("client").facts
    assert isinstance(facts, ClientData)
    return facts.code_version


async def test_new_code_is_fetched_checked_tried_by_the_inference_agent_and_then_ready(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await publish(fed, old, new)
    update = await fed.hears(InferUpdate)
    assert (update.model.version, update.code_version) == (1, new)
    assert fed.heard(CodeReady) == []
    await send_infer_ready(fed, update.model, new)
    said = await fed.hears(CodeReady)
    assert (said.client, said.code_version) == (CLIENT_NAME, new)
    await fed.happens("client", "code_ready")
    assert fed.events("client")[3:] == ["code_published", "code_ready"]
    assert version_of(fed) == new


async def test_code_that_the_inference_agent_cannot_serve_with_is_refused(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await publish(fed, old, new)
    update = await fed.hears(InferUpdate)
    await send_infer_refused(fed, update.model, serving=1, code_version=new)
    said = await fed.hears(CodeRefused)
    assert (said.reason, said.stays_on) == ("NaN", old)
    await fed.happens("client", "code_refused")
    assert version_of(fed) == old


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tiny/client_app.py": "import a_library_that_nobody_has\n"}, "a_library_that_nobody_has"),
        ({"tiny/model.py": "class Net: pass\n"}, "did not make a model"),
        ({"pyproject.toml": "[tool.fedbus]\n"}, "pyproject.toml"),
    ],
    ids=["an import that fails", "no model", "no task"],
)
async def test_code_that_does_not_work_is_refused_and_the_device_serves_on(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
    files: dict[str, str],
    reason: str,
) -> None:
    old = repository.head
    broken = repository.commit(files, by=ada)
    await publish(fed, old, broken)
    assert reason in (await fed.hears(CodeRefused)).reason
    assert (await fed.happens("client", "code_refused")).target == "serving"
    assert fed.heard(InferUpdate) == []


async def test_unsigned_code_is_refused_whatever_the_server_says(
    fed: FederationHarness, server: FakeServer, client: RunningAgent, repository: Repository
) -> None:
    old = repository.head
    unsigned = repository.commit({"tiny/__init__.py": "print('gotcha')\n"})
    await publish(fed, unsigned)
    assert "not signed" in (await fed.hears(CodeRefused)).reason
    assert version_of(fed) == old


async def test_in_another_rollout_a_device_tries_again_what_it_had_refused(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    tmp_path: Path,
) -> None:
    old = repository.head
    bob = make_signer("bob", tmp_path)
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=bob)
    await publish(fed, old, new, attempt=1)
    assert (await fed.hears(CodeRefused)).attempt == 1
    await fed.happens("client", "code_refused")
    with (tmp_path / "allowed_signers").open("a") as allowed:
        allowed.write(bob.line())
    await publish(fed, old, new, attempt=2)
    await send_infer_ready(fed, (await fed.hears(InferUpdate)).model, new)
    assert (await fed.hears(CodeReady)).attempt == 2


async def test_a_device_that_trains_changes_over_when_the_run_is_over(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await server.invites()
    await fed.hears(ClientStart)
    await fed.reaches("client", "learning")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await publish(fed, old, new)
    closed = FinTrain(task=TASK, client=CLIENT_NAME, run=RUN, new_model=False)
    await fed.say(closed, by="flower-client")
    assert (await fed.hears(InferUpdate)).code_version == new
    assert fed.events("client")[3:] == ["client_start", "fin_train", "no_new_model", "code_published"]


async def test_a_device_that_comes_back_catches_up_before_it_serves(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await client.kill()
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    server.code = CodePlan(code_version=new)
    client.start()
    await wait_for_infer_start(fed, times=2)
    assert (await fed.hears(CodeReady)).code_version == new
    assert (await fed.happens("client", "model_fetched", times=2)).facts.code_version == new  # type: ignore[union-attr]


async def test_everybody_goes_back_when_a_rollout_is_reverted(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await publish(fed, old, new)
    await send_infer_ready(fed, (await fed.hears(InferUpdate)).model, new)
    await fed.happens("client", "code_ready")
    await publish(fed, old)
    back = await fed.hears(InferUpdate, times=2)
    assert back.code_version == old
    await send_infer_ready(fed, back.model, old)
    await fed.happens("client", "code_ready", times=2)
    assert version_of(fed) == old


async def test_a_repository_that_is_away_is_waited_for_while_the_device_serves(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    repository.path.rename(repository.path.with_name("elsewhere"))
    await publish(fed, old, new)
    await fed.happens("client", "code_published")
    await asyncio.sleep(0.5)
    assert fed.heard(CodeRefused) == []
    repository.path.with_name("elsewhere").rename(repository.path)
    assert (await fed.hears(InferUpdate)).code_version == new


# --- signed models -------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> tuple[ModelSigner, TrustedKeys]:
    public = generate_key(tmp_path / "fedbus.key")
    return ModelSigner.read(tmp_path / "fedbus.key"), TrustedKeys.read(public)


async def test_where_keys_are_trusted_a_signed_model_is_served_and_an_unsigned_one_is_not(
    fed: FederationHarness, server: FakeServer, keys: tuple[ModelSigner, TrustedKeys]
) -> None:
    server.signer, trusted = keys
    fed.site = replace(fed.site, trusted=trusted)
    async with fed.agent(lambda stop: client_manager(fed.device(CLIENT_NAME), stop)):
        await send_infer_ready(fed, await wait_for_infer_start(fed))
        await fed.reaches("client", "serving")
        server.signer = None
        await server.publishes(2)
        told = await fed.happens("client", "infer_refused")
        assert "is not signed" in told.reason
        assert fed.heard(InferUpdate) == []


async def test_a_model_with_a_stranger_s_signature_is_never_active(
    fed: FederationHarness, server: FakeServer, keys: tuple[ModelSigner, TrustedKeys], tmp_path: Path
) -> None:
    server.signer, trusted = keys
    fed.site = replace(fed.site, trusted=trusted)
    async with fed.agent(lambda stop: client_manager(fed.device(CLIENT_NAME), stop)):
        await send_infer_ready(fed, await wait_for_infer_start(fed))
        await fed.reaches("client", "serving")
        generate_key(tmp_path / "stranger.key")
        server.signer = ModelSigner.read(tmp_path / "stranger.key")
        await server.publishes(2)
        told = await fed.happens("client", "infer_refused")
        assert "is signed with the key" in told.reason
        assert fed.heard(InferUpdate) == []
