"""A server manager whose model store is unusable: at its first start, and after a restart.

A store, in a directory or in a real S3 behind a proxy, may be empty, unavailable, denied or damaged. The manager
publishes which it is, keeps answering, builds no model where there was one, and resumes by itself when the store is
usable again.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support import eventually
from support.fake_flower_server import FakeFlowerServer
from support.federation import TASK, FederationHarness, RunningAgent
from support.s3_server import FaultyProxy, run_faulty_proxy, run_seaweed

from fedbus.agents.server_manager.agent import ServerManager
from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.bus.errors import RequestRefused
from fedbus.contracts.champion import Champion, PromoteModel
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CodePublished
from fedbus.contracts.flower_server import BeginTraining
from fedbus.contracts.identifiers import TaskId
from fedbus.contracts.model import Manifest
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import GetServerInfo, ModelPublished, OpenRun, ServerState, StoreProblem
from fedbus.stores.errors import StoreDenied
from fedbus.stores.models.directory import DirectoryObjectStore
from fedbus.stores.models.open import ModelRepository, open_model_store
from fedbus.stores.s3.bucket import Bucket, BucketAddress

RUN = f"{TASK}-1"
PLAN = RunPlan(rounds=1, quorum=1, recruit_s=60, round_s=60)
MARK = "fedbus-models.json"


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as s3:
        yield s3


# --- two repositories that can be spoilt, and mended ---------------------------------------------------------------


@dataclass
class DirectoryStore:
    """A directory; damaged files have a backup."""

    url: str
    backup: Path

    @property
    def home(self) -> Path:
        return Path(self.url) / TASK

    async def break_store(self, trouble: StoreProblem) -> None:
        match trouble:
            case StoreProblem.DAMAGED:
                (self.home / "latest").rename(self.backup / "latest")
                (self.home / "latest").write_text("{")
            case _:
                self.home.rename(self.backup / TASK)
        if trouble is StoreProblem.EMPTY:
            await open_model_store(self.url, TASK).prepare()

    async def repair(self) -> None:
        if (self.backup / "latest").exists():
            (self.backup / "latest").rename(self.home / "latest")
            return
        if self.home.exists():
            self.home.rename(self.backup / "empty")
        (self.backup / TASK).rename(self.home)

    async def overwrite(self, name: str, content: bytes) -> None:
        (self.home / name).write_bytes(content)


@dataclass
class S3Store:
    """A store in an S3 behind a proxy of its own, with a key that can be replaced by a wrong one."""

    url: str
    s3: EmbeddedS3
    proxy: FaultyProxy
    monkeypatch: pytest.MonkeyPatch
    backup: Path
    removed: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.backup / "wrong").write_text(
            "[default]\naws_access_key_id = AKIA\naws_secret_access_key = hush\n"
        )
        self.use_key(self.s3.credentials)

    def use_key(self, file: Path) -> None:
        self.monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(file))

    @property
    def bucket(self) -> Bucket:
        return Bucket(
            BucketAddress.parse(self.url.replace(f":{self.proxy.port}", f":{self.s3.port}")),
            credentials=self.s3.credentials,
        )

    def key(self, name: str) -> str:
        return f"{BucketAddress.parse(self.url).prefix}/{TASK}/{name}"

    async def break_store(self, trouble: StoreProblem) -> None:
        match trouble:
            case StoreProblem.UNAVAILABLE:
                self.proxy.close()
            case StoreProblem.DENIED:
                self.use_key(self.backup / "wrong")
            case StoreProblem.DAMAGED:
                await self._back_up("latest")
                await self.overwrite("latest", b"{")
            case StoreProblem.EMPTY:
                prefix = self.key("")
                for one in await self.bucket.list_objects(prefix):
                    if not one.key.endswith(MARK):
                        await self._back_up(one.key.removeprefix(prefix))

    async def repair(self) -> None:
        self.use_key(self.s3.credentials)
        self.proxy.reopen()
        for name, content in self.removed.items():
            await self.overwrite(name, content)

    async def overwrite(self, name: str, content: bytes) -> None:
        await self.bucket.write(self.key(name), content)

    async def _back_up(self, name: str) -> None:
        found = await self.bucket.read(self.key(name))
        assert found is not None
        self.removed[name] = found.content
        await self.bucket.delete(self.key(name))


StoreUnderTest = DirectoryStore | S3Store
DIRECTORY_TROUBLES = [StoreProblem.UNAVAILABLE, StoreProblem.DAMAGED, StoreProblem.EMPTY]
"""A directory without permission counts as unavailable: whether it exists cannot be seen."""
ERROR_TEXT = {
    StoreProblem.UNAVAILABLE: "cannot use ",
    StoreProblem.DENIED: " denied: ",
    StoreProblem.DAMAGED: "latest is corrupt",
    StoreProblem.EMPTY: "is not the model repository that the log names, with version 1: it is empty",
}


@pytest.fixture
async def store_under_test(
    request: pytest.FixtureRequest,
    fed: FederationHarness,
    s3_server: EmbeddedS3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[StoreUnderTest]:
    """Where the models of the federation lie; each manager that starts finds its cache empty."""
    local = tmp_path / "local"
    local.mkdir()
    if request.param == "directory":
        yield DirectoryStore(fed.config.store_url, local)
        return
    async with run_faulty_proxy(s3_server.port) as way:
        url = f"s3://fedbus/{tmp_path.name}?endpoint=http://127.0.0.1:{way.port}&cache={tmp_path / 'cache'}"
        fed.config = replace(fed.config, store=url)
        store_under_test = S3Store(url, s3_server, way, monkeypatch, local)
        yield store_under_test
        await store_under_test.repair()


def for_each_store(in_directory: list[StoreProblem], in_s3: list[StoreProblem]) -> pytest.MarkDecorator:
    cases = [("directory", one) for one in in_directory] + [("s3", one) for one in in_s3]
    return pytest.mark.parametrize(("store_under_test", "trouble"), cases, indirect=["store_under_test"])


# --- fixtures ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def builder(
    fed: FederationHarness, store_under_test: StoreUnderTest
) -> AsyncIterator[FakeFlowerServer]:
    async with FakeFlowerServer(fed).serve() as builder:
        yield builder


@asynccontextmanager
async def run_manager(fed: FederationHarness, *, keeps_copies: bool = False) -> AsyncIterator[RunningAgent]:
    """A server manager that is not patient with an S3; its cache is empty whenever it starts, or keeps its copies."""

    async def run(stop: asyncio.Event) -> None:
        if not keeps_copies:
            shutil.rmtree(fed.config.home.parent / "cache", ignore_errors=True)
        async with fed.config.connect_bus("server-manager") as bus:
            store = open_model_store(fed.config.store_url, fed.config.task.id, patience_s=0.2)
            await ServerManager(bus, fed.config.task, store).run(stop)

    async with fed.run_agent(run) as manager:
        yield manager


async def publish_version(fed: FederationHarness, builder: FakeFlowerServer, number: int) -> Manifest:
    """A version that is published in the store, and unknown to the log."""
    facts = (await builder.make_artifact()).model_dump()
    manifest = Manifest(**facts, version=number, task=TASK, created=datetime.now(UTC))
    return await open_model_store(fed.config.store_url, TASK).publish(manifest)


async def refusal_reason(asks: Callable[[], Awaitable[Any]]) -> str:
    with pytest.raises(RequestRefused) as error:
        await asks()
    return error.value.reason


async def is_model_served(fed: FederationHarness) -> bool:
    try:
        await fed.bus.request(GetServerInfo(task=TASK))
    except RequestRefused:
        return False
    return True


def request_run(fed: FederationHarness) -> Callable[[], Awaitable[Any]]:
    return lambda: fed.bus.request(OpenRun(task=TASK, run=RUN, plan=PLAN))


# --- the first start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store_under_test", ["directory", "s3"], indirect=True)
async def test_an_empty_repository_of_a_new_federation_gets_a_first_model(
    fed: FederationHarness, builder: FakeFlowerServer
) -> None:
    async with run_manager(fed):
        await fed.wait_for_state("server", "waiting")
    assert builder.model_count == 1
    assert fed.events_of("server") == ["started", "model_ready"]


@for_each_store([StoreProblem.DAMAGED], [StoreProblem.UNAVAILABLE, StoreProblem.DENIED, StoreProblem.DAMAGED])
async def test_a_first_start_waits_for_an_unusable_store(
    fed: FederationHarness, store_under_test: StoreUnderTest, builder: FakeFlowerServer, trouble: StoreProblem
) -> None:
    await open_model_store(fed.config.store_url, TASK).prepare()
    there = await publish_version(fed, builder, 1)
    await store_under_test.break_store(trouble)
    async with run_manager(fed):
        transition = await fed.wait_for_event("server", "store_unavailable")
        assert (transition.target, fed.server_facts().trouble) == (ServerState.MODEL_INIT, trouble)
        assert ERROR_TEXT[trouble] in transition.reason
        assert "hush" not in transition.reason
        for asks in (request_run(fed), lambda: fed.bus.request(GetServerInfo(task=TASK))):
            assert transition.reason in await refusal_reason(asks)
        await store_under_test.repair()
        await fed.wait_for_state("server", "waiting")
        assert (fed.server_facts().model, fed.server_facts().trouble) == (there.ref, None)
        await request_run(fed)()
    assert builder.model_count == 1, "only what was there before"


@pytest.mark.parametrize("store_under_test", ["directory"], indirect=True)
async def test_an_impossible_directory_is_reported_as_unavailable(
    fed: FederationHarness, builder: FakeFlowerServer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    fed.config = replace(fed.config, store=str(tmp_path / "file" / "models"))
    async with run_manager(fed) as manager:
        transition = await fed.wait_for_event("server", "store_unavailable")
        assert "make it a directory that exists" in transition.reason
        assert fed.server_facts().trouble is StoreProblem.UNAVAILABLE
        assert not manager.error
    assert builder.model_count == 0


# --- a restart -------------------------------------------------------------------------------------------------------


@for_each_store(DIRECTORY_TROUBLES, list(StoreProblem))
async def test_a_restart_waits_for_an_unusable_store(
    fed: FederationHarness, store_under_test: StoreUnderTest, builder: FakeFlowerServer, trouble: StoreProblem
) -> None:
    async with run_manager(fed) as manager:
        await fed.wait_for_message(CodePublished)
        model = fed.server_facts().model
        await manager.kill()
        await store_under_test.break_store(trouble)
        manager.start()
        transition = await fed.wait_for_event("server", "store_unavailable")
        assert (transition.target, fed.server_facts().trouble) == (ServerState.WAITING, trouble)
        assert ERROR_TEXT[trouble] in transition.reason
        assert await refusal_reason(request_run(fed)) == transition.reason
        if trouble is not StoreProblem.DAMAGED:  # corrupt: the champion itself is available
            assert transition.reason in await refusal_reason(
                lambda: fed.bus.request(GetServerInfo(task=TASK))
            )
        if trouble is StoreProblem.UNAVAILABLE and isinstance(store_under_test, DirectoryStore):
            assert not store_under_test.home.exists(), "nothing is created in place of the unavailable store"

        await store_under_test.repair()
        await fed.wait_for_event("server", "store_recovered")
        info = await fed.bus.request(GetServerInfo(task=TASK))
        assert (info.model, fed.server_facts().trouble) == (model, None)
        await request_run(fed)()
    assert builder.model_count == 1


@pytest.mark.parametrize("store_under_test", ["directory", "s3"], indirect=True)
async def test_a_corrupt_latest_pointer_does_not_stop_the_champion(
    fed: FederationHarness, store_under_test: StoreUnderTest, builder: FakeFlowerServer
) -> None:
    async with run_manager(fed) as manager:
        await fed.wait_for_message(CodePublished)
        await store_under_test.break_store(StoreProblem.DAMAGED)
        await manager.restart()
        await fed.wait_for_event("server", "store_unavailable")
        await eventually(lambda: is_model_served(fed))
        assert fed.server_facts().trouble is StoreProblem.DAMAGED
        assert (await fed.wait_for_message(ModelPublished)).model == fed.server_facts().model


@for_each_store([], [StoreProblem.UNAVAILABLE, StoreProblem.DENIED])
async def test_a_local_copy_is_offered_while_s3_is_unavailable(
    fed: FederationHarness, store_under_test: StoreUnderTest, builder: FakeFlowerServer, trouble: StoreProblem
) -> None:
    async with run_manager(fed, keeps_copies=True) as manager:
        await fed.wait_for_message(CodePublished)
        await manager.kill()
        await store_under_test.break_store(trouble)
        manager.start()
        transition = await fed.wait_for_event("server", "store_unavailable")
        await eventually(lambda: is_model_served(fed))
        assert await refusal_reason(request_run(fed)) == transition.reason


@pytest.mark.parametrize("store_under_test", ["directory", "s3"], indirect=True)
async def test_corrupt_weights_can_be_replaced_by_another_version(
    fed: FederationHarness, store_under_test: StoreUnderTest, builder: FakeFlowerServer
) -> None:
    async with run_manager(fed) as manager:
        await fed.wait_for_message(CodePublished)
        champion = fed.server_facts().model
        assert champion is not None
        other = await publish_version(fed, builder, 2)
        await store_under_test.overwrite(f"{champion.sha256}.safetensors", b"\xff" * champion.size_bytes)
        await manager.restart()
        transition = await fed.wait_for_event("server", "store_unavailable")
        assert "its bytes have digest" in transition.reason
        assert fed.server_facts().trouble is StoreProblem.DAMAGED
        await fed.bus.request(PromoteModel(task=TASK, model_version=2))
        assert (await fed.wait_for_message(ModelPublished)).model == other.ref
        await fed.wait_for_event("server", "store_recovered")


@pytest.mark.parametrize("store_under_test", ["directory"], indirect=True)
async def test_another_repository_than_the_logs_counts_as_corrupt(
    fed: FederationHarness, store_under_test: StoreUnderTest, builder: FakeFlowerServer
) -> None:
    async with run_manager(fed) as manager:
        await fed.wait_for_message(CodePublished)
        await manager.kill()
        await store_under_test.break_store(StoreProblem.EMPTY)
        await publish_version(fed, builder, 1)
        manager.start()
        transition = await fed.wait_for_event("server", "store_unavailable")
        assert "its version 1 is another model" in transition.reason
        assert fed.server_facts().trouble is StoreProblem.DAMAGED
        assert not await is_model_served(fed)


class DeniedAfterPromotion(ModelRepository):
    """A directory whose weights cannot be read any more after a version was promoted."""

    should_deny = False
    is_denied = False

    async def set_champion(self, champion: Champion) -> Champion:
        crowned = await super().set_champion(champion)
        self.is_denied = self.should_deny
        return crowned

    async def local_path(self, sha256: str) -> Path:
        if self.is_denied:
            raise StoreDenied(self.url, "AccessDenied", remedy="give us the right")
        return await super().local_path(sha256)


@pytest.mark.parametrize("store_under_test", ["directory"], indirect=True)
async def test_a_new_champion_is_offered_when_its_weights_are_available(
    fed: FederationHarness, store_under_test: StoreUnderTest, builder: FakeFlowerServer
) -> None:
    store = DeniedAfterPromotion(DirectoryObjectStore(Path(store_under_test.url), TaskId(TASK)))

    async def run(stop: asyncio.Event) -> None:
        async with fed.config.connect_bus("server-manager") as bus:
            await ServerManager(bus, fed.config.task, store).run(stop)

    async with fed.run_agent(run):
        await fed.wait_for_message(CodePublished)
        other = await publish_version(fed, builder, 2)
        store.should_deny = True
        await fed.bus.request(PromoteModel(task=TASK, model_version=2))
        transition = await fed.wait_for_event("server", "store_unavailable")
        assert fed.server_facts().trouble is StoreProblem.DENIED
        assert transition.reason in await refusal_reason(lambda: fed.bus.request(GetServerInfo(task=TASK)))
        assert fed.messages_of(ModelPublished) == []
        store.is_denied = False
        assert (await fed.wait_for_message(ModelPublished)).model == other.ref
        await fed.wait_for_event("server", "store_recovered")


@pytest.mark.parametrize("training", [False, True], ids=["recruiting", "training"])
@pytest.mark.parametrize("store_under_test", ["directory"], indirect=True)
async def test_an_active_run_continues_while_the_repository_is_unusable(
    fed: FederationHarness, store_under_test: StoreUnderTest, builder: FakeFlowerServer, training: bool
) -> None:
    async with run_manager(fed) as manager:
        await fed.wait_for_message(CodePublished)
        await request_run(fed)()
        if training:
            await send_joined(fed)
        await manager.kill()
        await store_under_test.break_store(StoreProblem.UNAVAILABLE)
        manager.start()
        transition = await fed.wait_for_event("server", "store_unavailable")
        assert transition.target == ("training" if training else "recruiting")
        if not training:
            await store_under_test.repair()
            await fed.wait_for_event("server", "store_recovered")
            await send_joined(fed)
        else:
            await store_under_test.repair()
            assert (await fed.wait_for_event("server", "store_recovered")).target == "training"


async def send_joined(fed: FederationHarness) -> None:
    message = ClientJoined(task=TASK, client="c1", run=RUN, code_version=fed.config.task.code_version)
    await fed.publish(message, sender="trainer")
    await fed.wait_for_message(BeginTraining)
