"""From a commit to new predictions, with nobody's hand: real git, real agents and processes, requests all the while."""

import asyncio
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support.all_agents import (
    is_settled,
    run_all_agents,
    served_versions,
    start_run,
    training_count,
    wait_for_run_end,
)
from support.federation import TINY_TASK, FederationHarness
from support.followed_repository import code_facts, follow_repository
from support.git_repositories import CommitSigner, Repository
from support.prediction_load import send_predictions
from support.s3_server import run_seaweed

from fedbus.app.demo.demo import MIN_ANSWERS_BY_NEWEST, DemoOptions, run_demo
from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.app.local.stack import EMBEDDED_STORE
from fedbus.app.settings import Settings
from fedbus.contracts.champion import RollBackModel
from fedbus.contracts.code import LookForCode
from fedbus.contracts.run import RunData

CLIENT_APP = (TINY_TASK / "tiny" / "client_app.py").read_text()
TWICE_AS_FAST = CLIENT_APP.replace('float("nan") if config["poison"] else 1.0', "2.0")
BACKWARDS = CLIENT_APP.replace('float("nan") if config["poison"] else 1.0', "-9.0")
BROKEN = CLIENT_APP.replace(
    "    time.sleep(", '    raise RuntimeError("a mistake in the new code")\n    time.sleep('
)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as s3:
        yield s3


@pytest.fixture
def models_in_s3(
    fed: FederationHarness, s3: EmbeddedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The federation's models lie in a real S3."""
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(s3.credentials))
    where = f"s3://fedbus/{tmp_path.name}?endpoint=http://127.0.0.1:{s3.port}&cache={tmp_path / 'cache'}"
    fed.config = replace(fed.config, store=where)


@pytest.fixture
async def repository(fed: FederationHarness, ada: CommitSigner, tmp_path: Path) -> Repository:
    """The tiny task's, which server and clients follow."""
    return await follow_repository(fed, ada, tmp_path)


def run_facts(fed: FederationHarness, number: int) -> RunData:
    facts = fed.last_transition("run", f"tiny-{number}").facts
    assert isinstance(facts, RunData)
    return facts


@pytest.mark.usefixtures("models_in_s3")
async def test_a_commit_leads_to_new_code_a_new_run_a_new_version_and_new_predictions(
    fed: FederationHarness, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    async with run_all_agents(fed, clients=2), send_predictions(fed) as asked:
        first = await wait_for_run_end(fed, await start_run(fed))
        assert (first.code_version, await training_count(fed)) == (old, 2.0)

        new = repository.commit({"tiny/client_app.py": TWICE_AS_FAST}, subject="twice as fast", by=ada)
        await fed.wait_for_event("code", "rollout_finished", within_s=60)  # it looks by itself
        second = await wait_for_run_end(fed, "tiny-2")

        assert (second.trigger, second.code_version) == ("new code", new)
        assert await training_count(fed) == 6.0  # two rounds by one, two rounds by two
        assert code_facts(fed).code_version == new
        await fed.wait_until(lambda: asked.versions[-2:] == [3, 3])
    assert asked.errors == []
    assert sorted(set(asked.versions)) == [1, 2, 3]


@pytest.mark.slow
async def test_code_that_fails_in_training_goes_back_by_itself_and_costs_no_prediction(
    fed: FederationHarness, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    async with run_all_agents(fed, clients=2), send_predictions(fed) as asked:
        await wait_for_run_end(fed, await start_run(fed))
        bad = repository.commit({"tiny/client_app.py": BROKEN}, subject="a mistake", by=ada)
        await fed.bus.request(LookForCode(task="tiny"), timeout_s=60)
        back = await fed.wait_for_event("code", "rollout_reverted", within_s=60)
        assert bad[:12] in back.reason
        assert bad in code_facts(fed).rejected
        await fed.wait_for_event("client", "code_ready", "c1.tiny", times=2, within_s=60)  # there, and back
        await fed.wait_until(lambda: is_settled(fed), within_s=60)
        again = await wait_for_run_end(fed, await start_run(fed))
        assert again.code_version == old
    assert asked.errors == []


@pytest.mark.slow
async def test_code_that_makes_the_model_worse_goes_back_and_its_model_is_not_served(
    fed: FederationHarness, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    async with run_all_agents(fed, clients=2), send_predictions(fed) as asked:
        await wait_for_run_end(fed, await start_run(fed))
        repository.commit({"tiny/client_app.py": BACKWARDS}, subject="the wrong way", by=ada)
        await fed.bus.request(LookForCode(task="tiny"), timeout_s=60)
        assert (
            "model not promoted" in (await fed.wait_for_event("code", "rollout_reverted", within_s=60)).reason
        )
        assert code_facts(fed).code_version == old
        assert not run_facts(fed, 2).promoted
        await fed.wait_until(lambda: is_settled(fed), within_s=60)
        assert set(served_versions(fed).values()) == {2}
    assert asked.errors == []
    assert 3 not in asked.versions


async def test_a_rollback_reaches_every_client_within_seconds_and_one_that_was_away_when_it_returns(
    fed: FederationHarness, repository: Repository
) -> None:
    async with run_all_agents(fed, clients=2) as everyone:
        await wait_for_run_end(fed, await start_run(fed))
        for agent in everyone["c2"].values():
            await agent.kill()
        async with send_predictions(fed):
            await fed.bus.request(RollBackModel(task="tiny"))
            await fed.wait_until(lambda: served_versions(fed)["c1"] == 1, within_s=10)
        for agent in everyone["c2"].values():
            agent.start()
        await fed.wait_until(lambda: served_versions(fed) == {"c1": 1, "c2": 1}, within_s=30)
        await fed.wait_until(lambda: is_settled(fed), within_s=30)


@pytest.mark.slow
async def test_in_the_demonstration_each_further_run_is_set_off_by_a_commit_of_its_own_and_is_answered_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDBUS_ALLOWED_SIGNERS", "")  # the demonstration names its own, for its processes
    told = tmp_path / "facts.json"
    wishes = DemoOptions(
        TINY_TASK,
        clients=2,
        rounds=1,
        runs=3,
        store=EMBEDDED_STORE,
        commit=True,
        json_file=told,
        plot_file=tmp_path / "x.png",
    )
    settings = Settings.from_environment({"FEDBUS_HOME": str(tmp_path / "home")})
    report = await run_demo(wishes, settings, asyncio.Event(), Console(file=io.StringIO()))
    assert report.ok
    facts = json.loads(told.read_text())
    assert [run["trigger"] for run in facts["runs"]] == ["schedule", "new code", "new code"]
    assert [run["model_version"] for run in facts["runs"]] == [2, 3, 4]
    assert len({run["code_version"] for run in facts["runs"]}) == 3
    answers = report.predictions.by_client
    assert all(answers[client, 4] >= MIN_ANSWERS_BY_NEWEST for client in ("c1", "c2"))
    assert facts["predictions"]["failed"] == 0
