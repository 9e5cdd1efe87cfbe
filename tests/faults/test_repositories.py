"""Faults of the model repository and the code repository: predictions continue, and nothing invalid becomes active.

The tests use a real SeaweedFS behind a faulty proxy, real git, all agents, and continuous predictions. Each test
ends with a check of the whole lifecycle stream: each served model is a published version with the published bytes,
and each active code version is an allowed commit.
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

OUTAGE_S = 60.0
LARGE_MODEL = (
    ("model.py", "__init__(3, 4)", "__init__(3, 40_000)"),
    ("server_app.py", "np.zeros((4, 3), np.float32)", "np.zeros((40_000, 3), np.float32)"),
    ("server_app.py", "np.zeros(4, np.float32)", "np.zeros(40_000, np.float32)"),
)
"""Replacements that make the weights of the tiny model larger than one chunk."""


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
    """A federation whose model repository is the S3 behind *proxy*."""
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(s3.credentials))
    async with open_federation(nats.url, tmp_path) as fed:
        fed.config = replace(fed.config, store=store_url(proxy, tmp_path))
        yield fed


def store_url(proxy: FaultyProxy, directory: Path) -> str:
    """Return the URL of a prefix and a cache of this test, through *proxy*."""
    return f"s3://fedbus/{directory.name}?endpoint=http://127.0.0.1:{proxy.port}&cache={directory / 'cache'}"


@asynccontextmanager
async def run_everything(fed: FederationHarness, *, clients: int = 2) -> AsyncIterator[PredictionTally]:
    """Run all agents with predictions; at the end, check that no request failed and nothing invalid was active."""
    allowed = {fed.config.task.code_version}
    async with run_all_agents(fed, clients=clients), send_predictions(fed) as predictions:
        yield predictions
        before = predictions.answer_count
        await fed.wait_until(lambda: predictions.answer_count > before, "further predictions")
    assert predictions.errors == []
    assert predictions.answer_count > 0
    await assert_only_valid_versions_were_active(fed, allowed)


async def assert_only_valid_versions_were_active(fed: FederationHarness, allowed: set[str]) -> None:
    """Check the whole lifecycle stream: models are published versions, code versions are in *allowed*."""
    store = open_model_store(fed.config.store_url, TASK)
    published = {manifest.version: manifest.sha256 for manifest in await store.list_versions()}
    for transition in await read_transitions(fed.bus):
        match transition.facts:
            case ServerData(model=model) | InferenceData(model=model) if model is not None:
                assert published[model.version] == model.sha256, transition
        match transition.facts:
            case ServerData() | ClientData() | RunData() as facts if facts.code_version:
                assert facts.code_version in allowed, transition
            case CodeData() as facts:
                assert {facts.code_version, facts.candidate} - {""} <= allowed, transition
            case _:
                pass


def is_in_round(fed: FederationHarness, number: int) -> bool:
    """Return whether the first run is in round *number* or later."""
    return bool(fed.transitions_of("run")) and len(fed.run_facts(1).rounds) >= number


async def wait_for_model(fed: FederationHarness, run: str, *, within_s: float = 60) -> RunData:
    """Wait until *run* has finished and each client serves its model."""
    facts = await wait_for_run_end(fed, run, within_s=within_s)
    assert fed.last_transition("run", run).target == RunState.FINISHED, fed.last_transition("run", run).reason
    assert facts.model is not None
    assert facts.promoted
    return facts


async def wait_for_failure(fed: FederationHarness, run: str) -> str:
    """Wait until *run* has failed, and return the reason."""
    await fed.wait_until(
        lambda: fed.last_transition("run", run).target in RUN.final, f"the end of {run}", 120
    )
    assert fed.last_transition("run", run).target == RunState.FAILED
    await fed.wait_until(lambda: is_settled(fed), within_s=60)
    return fed.last_transition("run", run).reason


# --- model repository --------------------------------------------------------------------------


async def test_a_run_and_predictions_survive_an_s3_outage_of_a_minute(
    fed: FederationHarness, proxy: FaultyProxy
) -> None:
    async with run_everything(fed) as predictions:
        run = await start_run(fed, config={"pause-s": 1.0}, rounds=3)
        await fed.wait_until(lambda: is_in_round(fed, 2), "the second round", 60)
        proxy.close()
        since, before = time.monotonic(), predictions.answer_count
        await fed.wait_until(
            lambda: time.monotonic() - since > OUTAGE_S, "the end of the outage", 2 * OUTAGE_S
        )
        assert predictions.answer_count > before, "predictions continued during the outage"
        assert await predictions.next_versions() == {1}
        proxy.reopen()
        facts = await wait_for_model(fed, run, within_s=120)
        assert len(facts.rounds) == 4
        assert await training_count(fed) == 3.0
        await fed.wait_until(lambda: predictions.versions[-2:] == [2, 2])


async def test_a_version_is_published_after_an_s3_outage(fed: FederationHarness, proxy: FaultyProxy) -> None:
    async with run_everything(fed) as predictions:
        proxy.close_on_request = b"/versions/2.json"
        run = await start_run(fed)
        await fed.wait_until(lambda: proxy.is_closed, "the upload of the version", 60)
        proxy.close_on_request, before = None, predictions.answer_count
        await fed.wait_until(lambda: predictions.answer_count > before + 100, "further predictions", 60)
        assert fed.last_transition("server").target == "publishing"
        assert set(predictions.versions) == {1}
        proxy.reopen()
        await wait_for_model(fed, run, within_s=120)
        assert set(served_versions(fed).values()) == {2}


async def test_a_run_finishes_with_a_slow_s3(fed: FederationHarness, proxy: FaultyProxy) -> None:
    async with run_everything(fed):
        proxy.response_delay_s = 0.5
        await wait_for_model(fed, await start_run(fed), within_s=150)
        proxy.response_delay_s = 0.0


async def test_truncated_downloads_of_weights_are_resumed(
    fed: FederationHarness, proxy: FaultyProxy, tmp_path: Path
) -> None:
    for name, small, large in LARGE_MODEL:
        file = Path(fed.config.task.path) / "tiny" / name
        file.write_text(file.read_text().replace(small, large))
    proxy.truncate_responses_at = [5_000, 50_000, 200]
    async with run_everything(fed):
        await wait_for_model(fed, await start_run(fed), within_s=120)
        assert proxy.truncate_responses_at == [], "all three responses were truncated"
        assert await training_count(fed) == 2.0


async def test_weights_with_a_wrong_digest_in_s3_are_never_served(
    fed: FederationHarness, s3: EmbeddedS3, tmp_path: Path
) -> None:
    store = open_model_store(fed.config.store_url, TASK)
    async with run_everything(fed) as predictions:
        await wait_for_model(fed, await start_run(fed))
        first = await store.read_manifest(1)
        await corrupt_object(s3, f"{tmp_path.name}/{TASK}/{first.sha256}.safetensors", first.size_bytes)
        await asyncio.to_thread(shutil.rmtree, tmp_path / "cache")
        with pytest.raises(RequestRefused, match="is corrupt"):
            await fed.bus.request(RollBackModel(task=TASK), timeout_s=60)
        await fed.wait_until(lambda: is_settled(fed))
        assert set(served_versions(fed).values()) == {2}
        assert await predictions.next_versions() == {2}


async def test_corrupt_weights_are_neither_served_nor_trained_from(nats: NatsServer, tmp_path: Path) -> None:
    async with open_federation(nats.url, tmp_path) as fed, run_everything(fed) as predictions:
        await wait_for_model(fed, await start_run(fed))
        await wait_for_model(fed, await start_run(fed))
        for version in (2, 3):
            await overwrite_artifact(fed, version)
        with pytest.raises(RequestRefused, match="is corrupt: its bytes have digest"):
            await start_run(fed)
        with pytest.raises(RequestRefused, match="is corrupt: its bytes have digest"):
            await fed.bus.request(RollBackModel(task=TASK), timeout_s=60)
        assert set(served_versions(fed).values()) == {3}
        assert await predictions.next_versions() == {3}


async def overwrite_artifact(fed: FederationHarness, version: int) -> None:
    """Overwrite bytes in the artifact of *version*."""
    store = open_model_store(fed.config.store_url, TASK)
    file = await store.local_path((await store.read_manifest(version)).sha256)
    content = bytearray(file.read_bytes())
    content[-20:] = b"\xff" * 20
    file.write_bytes(content)


async def corrupt_object(s3: EmbeddedS3, key: str, size: int) -> None:
    """Replace the content of *key* with other bytes of the same size."""
    bucket = Bucket(BucketAddress.parse(s3.store_url))
    async with bucket.open():
        assert await bucket.read_size(key) == size
        await bucket.write(key, b"\xff" * size)


async def test_a_run_fails_with_the_reason_if_s3_denies_the_version(
    fed: FederationHarness, s3: EmbeddedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invalid = tmp_path / "credentials"
    invalid.write_text("[default]\naws_access_key_id = AKIA\naws_secret_access_key = hush\n")
    async with run_everything(fed) as predictions:
        run = await start_run(fed, config={"pause-s": 1.0}, rounds=2)
        await fed.wait_until(lambda: is_in_round(fed, 2), "the second round", 60)
        monkeypatch.setenv(
            "FEDBUS_S3_CREDENTIALS", str(invalid)
        )  # the process of the run has valid credentials
        reason = await wait_for_failure(fed, run)
        assert " denied: " in reason
        assert "hush" not in reason
        assert set(predictions.versions) == {1}
        monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(s3.credentials))
        await wait_for_model(fed, await start_run(fed))


async def test_two_servers_that_publish_concurrently_get_two_versions(
    fed: FederationHarness, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "nats").mkdir(parents=True)
    async with nats_server(elsewhere / "nats") as nats, open_federation(nats.url, elsewhere) as other:
        other.config = replace(other.config, store=fed.config.store, task=fed.config.task)
        async with run_everything(fed, clients=1), run_everything(other, clients=1):
            runs = await start_run(fed, rounds=1), await start_run(other, rounds=3)
            assert runs[0] == runs[1], "both runs have the same name"
            await asyncio.gather(wait_until_final(fed, runs[0]), wait_until_final(other, runs[1]))
            store = open_model_store(fed.config.store_url, TASK)
            rounds = {manifest.version: manifest.rounds for manifest in await store.list_versions()}
            assert sorted(rounds) == list(range(1, len(rounds) + 1))
            for federation in (fed, other):
                facts = federation.run_facts(1)
                if facts.model is not None and facts.promoted:
                    assert rounds[facts.model.version] == facts.plan.rounds, "the version is that of this run"


async def wait_until_final(fed: FederationHarness, run: str) -> None:
    """Wait until *run* is final; it may have lost the race for the version."""
    await fed.wait_until(
        lambda: fed.last_transition("run", run).target in RUN.final, f"the end of {run}", 120
    )
    await fed.wait_until(lambda: is_settled(fed), within_s=60)


# --- code repository -------------------------------------------------------------------------------

WITH_CHECK = (
    f'{(TINY_TASK / "pyproject.toml").read_text()}\n[tool.fedbus.code]\ncheck = "tiny.checks:check"\n'
)
FAILING_CHECK = 'def check() -> None:\n    raise ValueError("the labels are gone")\n'


def commit_forged(repository: Repository, directory: Path) -> str:
    directory.joinpath("eve").mkdir()
    repository.commit({"tiny/__init__.py": "X = 1\n"}, by=make_signer("eve", directory / "eve"))
    return "not from an allowed signer"


def commit_unsigned(repository: Repository, _: Path) -> str:
    repository.commit({"tiny/__init__.py": "X = 1\n"})
    return "it is not signed"


@pytest.mark.parametrize("commit", [commit_forged, commit_unsigned])
async def test_a_commit_without_an_allowed_signature_is_never_run(
    fed: FederationHarness, ada: CommitSigner, tmp_path: Path, commit: object
) -> None:
    assert callable(commit)
    repository = await follow_repository(fed, ada, tmp_path)
    async with run_everything(fed):
        reason = commit(repository, tmp_path)
        await assert_rejected(fed, repository.head, reason)


async def test_a_commit_with_a_failing_check_is_never_run(
    fed: FederationHarness, ada: CommitSigner, tmp_path: Path
) -> None:
    repository = await follow_repository(fed, ada, tmp_path)
    async with run_everything(fed):
        bad = repository.commit({"pyproject.toml": WITH_CHECK, "tiny/checks.py": FAILING_CHECK}, by=ada)
        await assert_rejected(fed, bad, "the labels are gone")


async def test_a_rewritten_history_is_not_followed(
    fed: FederationHarness, ada: CommitSigner, tmp_path: Path
) -> None:
    repository = await follow_repository(fed, ada, tmp_path)
    async with run_everything(fed):
        repository.write({"tiny/__init__.py": "X = 1\n"})
        repository.git("commit", "--quiet", "--all", "--amend", "-m", "rewritten", by=ada)
        await assert_rejected(fed, repository.head, "rewritten")


async def assert_rejected(fed: FederationHarness, version: str, reason: str) -> None:
    """Check that *version* is rejected with *reason* and a run uses the code deployed before."""
    old = code_facts(fed).code_version
    await fed.bus.request(LookForCode(task=TASK), timeout_s=90)
    assert reason in (await fed.wait_for_event("code", "code_rejected", within_s=60)).reason
    assert version in code_facts(fed).rejected
    assert (await wait_for_model(fed, await start_run(fed))).code_version == old
