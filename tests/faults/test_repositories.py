"""What goes wrong with the repositories of models and of code: predictions go on, and nothing wrong is ever active.

A real SeaweedFS at the end of a road that breaks, a real git; all agents at work, requests all the while. Each test
ends with the whole life stream: every model that a device served is a version that was published, with
the bytes it was published with, and every code that anybody was on is a commit that may be run.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support import NatsServer, nats_server
from support.all_agents import (
    is_settled,
    run_all_agents,
    served_versions,
    start_run,
    training_count,
    wait_for_run_end,
)
from support.federation import TASK, TINY_TASK, FederationHarness, open_federation, read_transitions
from support.followed_repository import code_facts, follow_repository
from support.git_repositories import CommitSigner, Repository, make_signer
from support.prediction_load import PredictionTally, send_predictions
from support.s3_server import FaultyProxy, run_faulty_proxy, run_seaweed

from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.bus.errors import RequestRefused
from fedbus.contracts.champion import RollBackModel
from fedbus.contracts.client import ClientData, InferenceData
from fedbus.contracts.code import CodeData, LookForCode
from fedbus.contracts.run import RUN, RunData, RunState
from fedbus.contracts.server import ServerData
from fedbus.stores.models.open import open_model_store
from fedbus.stores.s3.bucket import Bucket, BucketAddress

pytestmark = [pytest.mark.fault, pytest.mark.timeout(420)]

A_MINUTE_S = 60.0
WIDER = (
    ("model.py", "__init__(3, 4)", "__init__(3, 40_000)"),
    ("server_app.py", "np.zeros((4, 3), np.float32)", "np.zeros((40_000, 3), np.float32)"),
    ("server_app.py", "np.zeros(4, np.float32)", "np.zeros(40_000, np.float32)"),
)
"""What makes the tiny model too large to come in one piece."""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as s3:
        yield s3


@pytest.fixture
async def proxy(s3: EmbeddedS3) -> AsyncIterator[FaultyProxy]:
    async with run_faulty_proxy(s3.port) as proxy:
        yield proxy


@pytest.fixture
async def fed(
    nats: NatsServer, tmp_path: Path, s3: EmbeddedS3, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FederationHarness]:
    """A federation whose models lie in the S3 at the end of the road."""
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(s3.credentials))
    async with open_federation(nats.url, tmp_path) as fed:
        fed.config = replace(fed.config, store=store_url(proxy, tmp_path))
        yield fed


def store_url(proxy: FaultyProxy, directory: Path) -> str:
    """A place of this test's own at the end of *way*, with a cache of its own."""
    return f"s3://fedbus/{directory.name}?endpoint=http://127.0.0.1:{proxy.port}&cache={directory / 'cache'}"


@asynccontextmanager
async def run_everything(fed: FederationHarness, *, clients: int = 2) -> AsyncIterator[PredictionTally]:
    """Everybody, and users who ask; when it ends no request has failed and nothing wrong was ever active."""
    allowed = {fed.config.task.code_version}
    async with run_all_agents(fed, clients=clients), send_predictions(fed) as asked:
        yield asked
        before = asked.answer_count
        await fed.wait_until(lambda: asked.answer_count > before, "predictions that go on")
    assert asked.errors == []
    assert asked.answer_count > 0
    await assert_nothing_wrong_was_active(fed, allowed)


async def assert_nothing_wrong_was_active(fed: FederationHarness, allowed: set[str]) -> None:
    """Over the whole life stream: *allowed* are the commits that may be run."""
    store = open_model_store(fed.config.store_url, TASK)
    published = {one.version: one.sha256 for one in await store.versions()}
    for told in await read_transitions(fed.bus):
        match told.facts:
            case ServerData(model=model) | InferenceData(model=model) if model is not None:
                assert published[model.version] == model.sha256, told
        match told.facts:
            case ServerData() | ClientData() | RunData() as facts if facts.code_version:
                assert facts.code_version in allowed, told
            case CodeData() as facts:
                assert {facts.code_version, facts.candidate} - {""} <= allowed, told


def is_in_round(fed: FederationHarness, number: int) -> bool:
    """Whether the first run has finished the round before *number*."""
    return bool(fed.transitions_of("run")) and len(fed.run_facts(1).rounds) >= number


async def wait_for_model(fed: FederationHarness, run: str, *, within_s: float = 60) -> RunData:
    """Wait until *run* has come to a model that every client serves."""
    facts = await wait_for_run_end(fed, run, within_s=within_s)
    assert fed.last_transition("run", run).target == RunState.FINISHED, fed.last_transition("run", run).reason
    assert facts.model is not None
    assert facts.promoted
    return facts


async def wait_for_failure(fed: FederationHarness, run: str) -> str:
    """Wait until *run* is over without a model; why."""
    await fed.wait_until(
        lambda: fed.last_transition("run", run).target in RUN.final, f"the end of {run}", 120
    )
    assert fed.last_transition("run", run).target == RunState.FAILED
    await fed.wait_until(lambda: is_settled(fed), within_s=60)
    return fed.last_transition("run", run).reason


# --- the road to the models -------------------------------------------------------------------


async def test_an_s3_that_is_away_for_a_minute_in_the_middle_of_a_run_costs_no_prediction_and_no_run(
    fed: FederationHarness, proxy: FaultyProxy
) -> None:
    async with run_everything(fed) as asked:
        run = await start_run(fed, config={"pause-s": 1.0}, rounds=3)
        await fed.wait_until(lambda: is_in_round(fed, 2), "the second round", 60)
        proxy.close()
        since, before = time.monotonic(), asked.answer_count
        await fed.wait_until(
            lambda: time.monotonic() - since > A_MINUTE_S, "a minute to pass", 2 * A_MINUTE_S
        )
        assert asked.answer_count > before, "predictions went on meanwhile"
        assert set(asked.versions[-2:]) == {1}
        proxy.reopen()
        facts = await wait_for_model(fed, run, within_s=120)
        assert len(facts.rounds) == 4
        assert await training_count(fed) == 3.0
        await fed.wait_until(lambda: asked.versions[-2:] == [2, 2])


async def test_an_s3_that_goes_as_the_version_is_written_gets_it_when_it_is_back(
    fed: FederationHarness, proxy: FaultyProxy
) -> None:
    async with run_everything(fed) as asked:
        proxy.close_on_request = b"/versions/2.json"
        run = await start_run(fed)
        await fed.wait_until(lambda: proxy.is_closed, "the version to be on its way", 60)
        proxy.close_on_request, before = None, asked.answer_count
        await fed.wait_until(lambda: asked.answer_count > before + 100, "predictions that go on", 60)
        assert fed.last_transition("server").target == "publishing"
        assert set(asked.versions) == {1}
        proxy.reopen()
        await wait_for_model(fed, run, within_s=120)
        assert set(served_versions(fed).values()) == {2}


async def test_a_slow_s3_is_waited_for(fed: FederationHarness, proxy: FaultyProxy) -> None:
    async with run_everything(fed):
        proxy.response_delay_s = 0.5
        await wait_for_model(fed, await start_run(fed), within_s=150)
        proxy.response_delay_s = 0.0


async def test_weights_that_are_cut_on_the_way_are_fetched_on_and_served_whole(
    fed: FederationHarness, proxy: FaultyProxy, tmp_path: Path
) -> None:
    for name, narrow, wide in WIDER:
        file = Path(fed.config.task.path) / "tiny" / name
        file.write_text(file.read_text().replace(narrow, wide))
    proxy.truncate_responses_at = [5_000, 50_000, 200]
    async with run_everything(fed):
        await wait_for_model(fed, await start_run(fed), within_s=120)
        assert proxy.truncate_responses_at == [], "all three were cut"
        assert await training_count(fed) == 2.0


async def test_weights_that_are_not_what_their_digest_says_are_never_served(
    fed: FederationHarness, s3: EmbeddedS3, tmp_path: Path
) -> None:
    store = open_model_store(fed.config.store_url, TASK)
    async with run_everything(fed) as asked:
        await wait_for_model(fed, await start_run(fed))
        first = await store.manifest(1)
        await corrupt_object(s3, f"{tmp_path.name}/{TASK}/{first.sha256}.safetensors", first.size_bytes)
        await asyncio.to_thread(shutil.rmtree, tmp_path / "cache")
        with pytest.raises(RequestRefused, match="is corrupt"):
            await fed.bus.request(RollBackModel(task=TASK), timeout_s=60)
        await fed.wait_until(lambda: is_settled(fed))
        assert set(served_versions(fed).values()) == {2}
        assert set(asked.versions[-2:]) == {2}


async def test_damaged_weights_in_a_directory_are_never_trained_from_nor_served(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with open_federation(nats.url, tmp_path) as fed, run_everything(fed) as asked:
        await wait_for_model(fed, await start_run(fed))
        await wait_for_model(fed, await start_run(fed))
        for version in (2, 3):
            await overwrite_artifact(fed, version)
        with pytest.raises(RequestRefused, match="is corrupt: its bytes have digest"):
            await start_run(fed)
        with pytest.raises(RequestRefused, match="is corrupt: its bytes have digest"):
            await fed.bus.request(RollBackModel(task=TASK), timeout_s=60)
        assert set(served_versions(fed).values()) == {3}
        assert set(asked.versions[-2:]) == {3}


async def overwrite_artifact(fed: FederationHarness, version: int) -> None:
    """Other bytes, as many, in the middle of what *version* keeps."""
    store = open_model_store(fed.config.store_url, TASK)
    file = await store.path_of((await store.manifest(version)).sha256)
    content = bytearray(file.read_bytes())
    content[-20:] = b"\xff" * 20
    file.write_bytes(content)


async def corrupt_object(s3: EmbeddedS3, key: str, size: int) -> None:
    """Put other bytes where *key* is."""
    bucket = Bucket(BucketAddress.parse(s3.store_url))
    async with bucket.open():
        assert await bucket.read_size(key) == size
        await bucket.write(key, b"\xff" * size)


async def test_an_s3_that_takes_no_version_any_more_is_named_and_the_old_model_goes_on(
    fed: FederationHarness, s3: EmbeddedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "credentials"
    wrong.write_text("[default]\naws_access_key_id = AKIA\naws_secret_access_key = hush\n")
    async with run_everything(fed) as asked:
        run = await start_run(fed, config={"pause-s": 1.0}, rounds=2)
        await fed.wait_until(lambda: is_in_round(fed, 2), "the second round", 60)
        monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(wrong))  # the run's own process has the right ones
        reason = await wait_for_failure(fed, run)
        assert " denied: " in reason
        assert "hush" not in reason
        assert set(asked.versions) == {1}
        monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(s3.credentials))
        await wait_for_model(fed, await start_run(fed))


async def test_two_servers_that_publish_at_once_each_get_a_version_of_their_own(
    fed: FederationHarness, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "nats").mkdir(parents=True)
    async with nats_server(elsewhere / "nats") as nats, open_federation(nats.url, elsewhere) as other:
        other.config = replace(other.config, store=fed.config.store, task=fed.config.task)
        async with run_everything(fed, clients=1), run_everything(other, clients=1):
            runs = await start_run(fed, rounds=1), await start_run(other, rounds=3)
            assert runs[0] == runs[1], "not even their runs' names tell them apart"
            await asyncio.gather(is_over(fed, runs[0]), is_over(other, runs[1]))
            store = open_model_store(fed.config.store_url, TASK)
            made = {one.version: one.rounds for one in await store.versions()}
            assert sorted(made) == list(range(1, len(made) + 1))
            for one in (fed, other):
                facts = one.run_facts(1)
                if facts.model is not None and facts.promoted:
                    assert made[facts.model.version] == facts.plan.rounds, (
                        "nobody takes another's for their own"
                    )


async def is_over(fed: FederationHarness, run: str) -> None:
    """Its run may have come to a version, or have heard that another was quicker."""
    await fed.wait_until(
        lambda: fed.last_transition("run", run).target in RUN.final, f"the end of {run}", 120
    )
    await fed.wait_until(lambda: is_settled(fed), within_s=60)


# --- commits ---------------------------------------------------------------------------------------

CHECKED = f'{(TINY_TASK / "pyproject.toml").read_text()}\n[tool.fedbus.code]\ncheck = "tiny.checks:check"\n'
NO = 'def check() -> None:\n    raise ValueError("the labels are gone")\n'


def commit_forged(repository: Repository, directory: Path) -> str:
    directory.joinpath("eve").mkdir()
    repository.commit({"tiny/__init__.py": "X = 1\n"}, by=make_signer("eve", directory / "eve"))
    return "not from an allowed signer"


def commit_unsigned(repository: Repository, _: Path) -> str:
    repository.commit({"tiny/__init__.py": "X = 1\n"})
    return "it is not signed"


@pytest.mark.parametrize("comes", [commit_forged, commit_unsigned])
async def test_a_commit_of_nobody_who_may_is_rejected_and_never_run(
    fed: FederationHarness, ada: CommitSigner, tmp_path: Path, comes: object
) -> None:
    assert callable(comes)
    repository = await follow_repository(fed, ada, tmp_path)
    async with run_everything(fed):
        says = comes(repository, tmp_path)
        await assert_rejected(fed, repository.head, says)


async def test_a_commit_whose_own_check_fails_is_rejected_and_never_run(
    fed: FederationHarness, ada: CommitSigner, tmp_path: Path
) -> None:
    repository = await follow_repository(fed, ada, tmp_path)
    async with run_everything(fed):
        bad = repository.commit({"pyproject.toml": CHECKED, "tiny/checks.py": NO}, by=ada)
        await assert_rejected(fed, bad, "the labels are gone")


async def test_a_history_that_is_rewritten_behind_us_is_not_followed(
    fed: FederationHarness, ada: CommitSigner, tmp_path: Path
) -> None:
    repository = await follow_repository(fed, ada, tmp_path)
    async with run_everything(fed):
        repository.write({"tiny/__init__.py": "X = 1\n"})
        repository.git("commit", "--quiet", "--all", "--amend", "-m", "another past", by=ada)
        await assert_rejected(fed, repository.head, "rewritten")


async def assert_rejected(fed: FederationHarness, version: str, says: str) -> None:
    """The event says why, and the next run is one of the code that was there before."""
    old = code_facts(fed).code_version
    await fed.bus.request(LookForCode(task=TASK), timeout_s=90)
    assert says in (await fed.wait_for_event("code", "code_rejected", within_s=60)).reason
    assert version in code_facts(fed).rejected
    assert (await wait_for_model(fed, await start_run(fed))).code_version == old
