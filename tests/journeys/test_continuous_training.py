"""From a commit to new predictions without manual steps: real git, agents and processes, continuous predictions."""

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
DOUBLE_STEP = CLIENT_APP.replace("step = 1.0", "step = 2.0")
NEGATIVE_STEP = CLIENT_APP.replace("step = 1.0", "step = -9.0")
BROKEN = CLIENT_APP.replace(
    "    time.sleep(", '    raise RuntimeError("an error in the new code")\n    time.sleep('
)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as s3:
        yield s3


@pytest.fixture
def models_in_s3(
    fed: FederationHarness, s3: EmbeddedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Store the models of the federation in a real S3."""
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(s3.credentials))
    store = f"s3://fedbus/{tmp_path.name}?endpoint=http://127.0.0.1:{s3.port}&cache={tmp_path / 'cache'}"
    fed.config = replace(fed.config, store=store)


@pytest.fixture
async def repository(fed: FederationHarness, ada: CommitSigner, tmp_path: Path) -> Repository:
    """The code repository of the tiny task, which the server side and the clients follow."""
    return await follow_repository(fed, ada, tmp_path)


def run_facts(fed: FederationHarness, number: int) -> RunData:
    facts = fed.last_transition("run", f"tiny-{number}").facts
    assert isinstance(facts, RunData)
    return facts


@pytest.mark.usefixtures("models_in_s3")
async def test_a_commit_leads_to_a_run_and_a_new_served_version(
    fed: FederationHarness, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    async with run_all_agents(fed, clients=2), send_predictions(fed) as predictions:
        first = await wait_for_run_end(fed, await start_run(fed))
        assert (first.code_version, await training_count(fed)) == (old, 2.0)

        new = repository.commit({"tiny/client_app.py": DOUBLE_STEP}, subject="double step", by=ada)
        await fed.wait_for_event("code", "rollout_finished", within_s=60)  # the server polls the repository
        second = await wait_for_run_end(fed, "tiny-2")

        assert (second.trigger, second.code_version) == ("new code", new)
        assert await training_count(fed) == 6.0  # two rounds add 1, two rounds add 2
        assert code_facts(fed).code_version == new
        await fed.wait_until(lambda: predictions.versions[-2:] == [3, 3])
    assert predictions.errors == []
    assert sorted(set(predictions.versions)) == [1, 2, 3]


@pytest.mark.slow
async def test_code_that_fails_in_training_is_reverted(
    fed: FederationHarness, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    async with run_all_agents(fed, clients=2), send_predictions(fed) as predictions:
        await wait_for_run_end(fed, await start_run(fed))
        bad = repository.commit({"tiny/client_app.py": BROKEN}, subject="an error", by=ada)
        await fed.bus.request(LookForCode(task="tiny"), timeout_s=60)
        reverted = await fed.wait_for_event("code", "rollout_reverted", within_s=60)
        assert bad[:12] in reverted.reason
        assert bad in code_facts(fed).rejected
        await fed.wait_for_event(
            "client", "code_ready", "c1.tiny", times=2, within_s=60
        )  # the new code, then the old
        await fed.wait_until(lambda: is_settled(fed), within_s=60)
        next_run = await wait_for_run_end(fed, await start_run(fed))
        assert next_run.code_version == old
    assert predictions.errors == []


@pytest.mark.slow
async def test_code_that_makes_the_model_worse_is_reverted(
    fed: FederationHarness, repository: Repository, ada: CommitSigner
) -> None:
    old = repository.head
    async with run_all_agents(fed, clients=2), send_predictions(fed) as predictions:
        await wait_for_run_end(fed, await start_run(fed))
        repository.commit({"tiny/client_app.py": NEGATIVE_STEP}, subject="negative step", by=ada)
        await fed.bus.request(LookForCode(task="tiny"), timeout_s=60)
        assert (
            "model not promoted" in (await fed.wait_for_event("code", "rollout_reverted", within_s=60)).reason
        )
        assert code_facts(fed).code_version == old
        assert not run_facts(fed, 2).promoted
        await fed.wait_until(lambda: is_settled(fed), within_s=60)
        assert set(served_versions(fed).values()) == {2}
    assert predictions.errors == []
    assert 3 not in predictions.versions


async def test_a_roll_back_reaches_each_client_even_after_a_restart(
    fed: FederationHarness, repository: Repository
) -> None:
    async with run_all_agents(fed, clients=2) as agents:
        await wait_for_run_end(fed, await start_run(fed))
        for agent in agents["c2"].values():
            await agent.kill()
        async with send_predictions(fed):
            await fed.bus.request(RollBackModel(task="tiny"))
            await fed.wait_until(lambda: served_versions(fed)["c1"] == 1, within_s=10)
        for agent in agents["c2"].values():
            agent.start()
        await fed.wait_until(lambda: served_versions(fed) == {"c1": 1, "c2": 1}, within_s=30)
        await fed.wait_until(lambda: is_settled(fed), within_s=30)


@pytest.mark.slow
async def test_the_demo_starts_each_further_run_by_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDBUS_ALLOWED_SIGNERS", "")  # the demo sets its own for its processes
    json_file = tmp_path / "facts.json"
    options = DemoOptions(
        TINY_TASK,
        clients=2,
        rounds=1,
        runs=3,
        store=EMBEDDED_STORE,
        commit=True,
        json_file=json_file,
        plot_file=tmp_path / "x.png",
    )
    settings = Settings.from_environment({"FEDBUS_HOME": str(tmp_path / "home")})
    report = await run_demo(options, settings, asyncio.Event(), Console(file=io.StringIO()))
    assert report.is_ok
    facts = json.loads(json_file.read_text())
    assert [run["trigger"] for run in facts["runs"]] == ["schedule", "new code", "new code"]
    assert [run["model_version"] for run in facts["runs"]] == [2, 3, 4]
    assert len({run["code_version"] for run in facts["runs"]}) == 3
    answers = report.predictions.by_client
    assert all(answers[client, 4] >= MIN_ANSWERS_BY_NEWEST for client in ("c1", "c2"))
    assert facts["predictions"]["failed"] == 0
