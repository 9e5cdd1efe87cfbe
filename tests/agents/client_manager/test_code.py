"""The code of a device: from a real repository, checked in a real process; the other agents are simulated."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_server import (
    CLIENT_NAME,
    RUN,
    FakeServer,
    send_infer_ready,
    send_infer_refused,
    wait_for_infer_start,
)
from support.federation import TASK, TINY_TASK, FederationHarness, RunningAgent
from support.git_repositories import CommitSigner, Repository, make_signer

from fedbus.app.composition.agents import client_manager
from fedbus.contracts.client import ClientData, ClientStart, FinTrain, InferUpdate
from fedbus.contracts.code import CodePlan, CodePublished, CodeReady, CodeRefused
from fedbus.learning.installed_libraries import open_library
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
    signers.write_text(ada.allowed_signers_line())
    code = open_code(f"{repository.url}@main", fed.config.home, open_library, signers=signers)
    first = await code.load_task(await code.fetch_latest())
    fed.config = replace(fed.config, code=code, task=first)
    return repository


@pytest.fixture
async def server(fed: FederationHarness, repository: Repository) -> AsyncIterator[FakeServer]:
    async with FakeServer(fed).serve() as server:
        await server.set_model(1)
        server.code = CodePlan(code_version=repository.head)
        yield server


@pytest.fixture
async def client(fed: FederationHarness, server: FakeServer) -> AsyncIterator[RunningAgent]:
    """A client that serves."""
    async with fed.run_agent(lambda stop: client_manager(fed.client_config(CLIENT_NAME), stop)) as agent:
        await send_infer_ready(fed, await wait_for_infer_start(fed))
        await fed.wait_for_state("client", "serving")
        yield agent


async def publish(fed: FederationHarness, stable: str, candidate: str = "", **more: object) -> None:
    message = {"task": TASK, "code_version": stable, "candidate": candidate, **more}
    await fed.publish(CodePublished.model_validate(message), sender="server-manager")


def version_of(fed: FederationHarness) -> str:
    facts = fed.last_transition("client").facts
    assert isinstance(facts, ClientData)
    return facts.code_version


async def test_new_code_is_checked_and_tried_before_it_is_ready(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await publish(fed, old, new)
    update = await fed.wait_for_message(InferUpdate)
    assert (update.model.version, update.code_version) == (1, new)
    assert fed.messages_of(CodeReady) == []
    await send_infer_ready(fed, update.model, new)
    message = await fed.wait_for_message(CodeReady)
    assert (message.client, message.code_version) == (CLIENT_NAME, new)
    await fed.wait_for_event("client", "code_ready")
    assert fed.events_of("client")[3:] == ["code_published", "code_ready"]
    assert version_of(fed) == new


async def test_code_that_cannot_serve_is_refused(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await publish(fed, old, new)
    update = await fed.wait_for_message(InferUpdate)
    await send_infer_refused(fed, update.model, serving=1, code_version=new)
    message = await fed.wait_for_message(CodeRefused)
    assert (message.reason, message.stays_on) == ("NaN", old)
    await fed.wait_for_event("client", "code_refused")
    assert version_of(fed) == old


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tiny/client_app.py": "import a_missing_library\n"}, "a_missing_library"),
        ({"tiny/model.py": "class Net: pass\n"}, "tiny.model:Net returned an object of type tiny.model.Net"),
        ({"pyproject.toml": "[tool.fedbus]\n"}, "pyproject.toml"),
    ],
    ids=["an import that fails", "no model", "no task"],
)
async def test_a_device_with_broken_new_code_serves_on(
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
    assert reason in (await fed.wait_for_message(CodeRefused)).reason
    assert (await fed.wait_for_event("client", "code_refused")).target == "serving"
    assert fed.messages_of(InferUpdate) == []


async def test_unsigned_code_is_refused_by_the_device(
    fed: FederationHarness, server: FakeServer, client: RunningAgent, repository: Repository
) -> None:
    old = repository.head
    unsigned = repository.commit({"tiny/__init__.py": "print('gotcha')\n"})
    await publish(fed, unsigned)
    assert "not signed" in (await fed.wait_for_message(CodeRefused)).reason
    assert version_of(fed) == old


async def test_refused_code_is_tried_again_in_another_rollout(
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
    assert (await fed.wait_for_message(CodeRefused)).attempt == 1
    await fed.wait_for_event("client", "code_refused")
    with (tmp_path / "allowed_signers").open("a") as allowed:
        allowed.write(bob.allowed_signers_line())
    await publish(fed, old, new, attempt=2)
    await send_infer_ready(fed, (await fed.wait_for_message(InferUpdate)).model, new)
    assert (await fed.wait_for_message(CodeReady)).attempt == 2


async def test_a_device_changes_its_code_after_its_run(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await server.send_invitation()
    await fed.wait_for_message(ClientStart)
    await fed.wait_for_state("client", "learning")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await publish(fed, old, new)
    closed = FinTrain(task=TASK, client=CLIENT_NAME, run=RUN, new_model=False)
    await fed.publish(closed, sender="flower-client")
    assert (await fed.wait_for_message(InferUpdate)).code_version == new
    await fed.wait_for_event("client", "code_published")  # transitions come from another stream
    assert fed.events_of("client")[3:] == ["client_start", "fin_train", "no_new_model", "code_published"]


async def test_a_device_that_reconnects_changes_its_code_first(
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
    assert (await fed.wait_for_message(CodeReady)).code_version == new
    assert (await fed.wait_for_event("client", "model_fetched", times=2)).facts.code_version == new  # type: ignore[union-attr]


async def test_a_reverted_rollout_takes_the_device_back(
    fed: FederationHarness,
    server: FakeServer,
    client: RunningAgent,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await publish(fed, old, new)
    await send_infer_ready(fed, (await fed.wait_for_message(InferUpdate)).model, new)
    await fed.wait_for_event("client", "code_ready")
    await publish(fed, old)
    back = await fed.wait_for_message(InferUpdate, times=2)
    assert back.code_version == old
    await send_infer_ready(fed, back.model, old)
    await fed.wait_for_event("client", "code_ready", times=2)
    assert version_of(fed) == old


async def test_a_device_serves_while_its_repository_is_unavailable(
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
    await fed.wait_for_event("client", "code_published")
    await asyncio.sleep(0.5)
    assert fed.messages_of(CodeRefused) == []
    repository.path.with_name("elsewhere").rename(repository.path)
    assert (await fed.wait_for_message(InferUpdate)).code_version == new


# --- signed models -------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> tuple[ModelSigner, TrustedKeys]:
    public = generate_key(tmp_path / "fedbus.key")
    return ModelSigner.load(tmp_path / "fedbus.key"), TrustedKeys.load(public)


async def test_a_device_with_trusted_keys_refuses_an_unsigned_model(
    fed: FederationHarness, server: FakeServer, keys: tuple[ModelSigner, TrustedKeys]
) -> None:
    server.signer, trusted = keys
    fed.config = replace(fed.config, trusted=trusted)
    async with fed.run_agent(lambda stop: client_manager(fed.client_config(CLIENT_NAME), stop)):
        await send_infer_ready(fed, await wait_for_infer_start(fed))
        await fed.wait_for_state("client", "serving")
        server.signer = None
        await server.publish_model(2)
        transition = await fed.wait_for_event("client", "infer_refused")
        assert "is not signed" in transition.reason
        assert fed.messages_of(InferUpdate) == []


async def test_a_model_signed_with_another_key_is_refused(
    fed: FederationHarness, server: FakeServer, keys: tuple[ModelSigner, TrustedKeys], tmp_path: Path
) -> None:
    server.signer, trusted = keys
    fed.config = replace(fed.config, trusted=trusted)
    async with fed.run_agent(lambda stop: client_manager(fed.client_config(CLIENT_NAME), stop)):
        await send_infer_ready(fed, await wait_for_infer_start(fed))
        await fed.wait_for_state("client", "serving")
        generate_key(tmp_path / "stranger.key")
        server.signer = ModelSigner.load(tmp_path / "stranger.key")
        await server.publish_model(2)
        transition = await fed.wait_for_event("client", "infer_refused")
        assert "is signed with the key" in transition.reason
        assert fed.messages_of(InferUpdate) == []
