"""From a commit to new predictions, with nobody's hand: real git, real agents and processes, requests all the while."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import pytest
from support.federation import TINY, Federation
from support.repositories import Repository, Signer, signer
from support.whole import ended, served, settled, start_run, trained, whole

from fedbus.contracts.client import InferenceFacts
from fedbus.contracts.code import CodeFacts, LookForCode
from fedbus.contracts.run import RunFacts
from fedbus.contracts.versions import RollBackModel
from fedbus.stores.code import open_code

CLIENT_APP = (TINY / "tiny" / "client_app.py").read_text()
TWICE_AS_FAST = CLIENT_APP.replace('float("nan") if config["poison"] else 1.0', "2.0")
BACKWARDS = CLIENT_APP.replace('float("nan") if config["poison"] else 1.0', "-9.0")
BROKEN = CLIENT_APP.replace(
    "    time.sleep(", '    raise RuntimeError("a mistake in the new code")\n    time.sleep('
)


@pytest.fixture(scope="module")
def ada(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return signer("ada", tmp_path_factory.mktemp("keys"))


@pytest.fixture
async def repository(fed: Federation, ada: Signer, tmp_path: Path) -> Repository:
    """The tiny task's, which server and clients follow."""
    path = tmp_path / "repository"
    shutil.copytree(TINY, path, ignore=shutil.ignore_patterns("__pycache__"))
    repository = Repository(path)
    repository.git("init", "--quiet", "--initial-branch=main")
    repository.commit(subject="the task", by=ada)
    signers = tmp_path / "allowed_signers"
    signers.write_text(ada.line())
    code = open_code(f"{repository.url}@main", fed.site.home, signers=signers)
    fed.site = replace(fed.site, code=code, task=await code.task_at(await code.newest()))
    return repository


@dataclass
class Asked:
    """What the users of all clients were answered."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


@asynccontextmanager
async def requests_flowing(fed: Federation) -> AsyncIterator[Asked]:
    """Predictions are asked for, of every client in turn, for as long as the block runs."""
    asked = Asked()

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            for endpoint in endpoints(fed):
                try:
                    async with session.post(f"{endpoint}/predict", json={"inputs": [[1, 1, 1]]}) as answer:
                        said = await answer.json()
                        assert answer.status == 200, said
                except (aiohttp.ClientError, AssertionError) as error:
                    asked.failed.append(repr(error))
                else:
                    asked.answered += 1
                    asked.versions.append(said["model_version"])
            await asyncio.sleep(0.02)

    async with aiohttp.ClientSession() as session:
        asking = asyncio.ensure_future(ask(session))
        try:
            yield asked
        finally:
            asking.cancel()
            await asyncio.wait([asking])


def endpoints(fed: Federation) -> list[str]:
    facts = [
        fed.last("inference", thing).facts for thing in sorted({one.thing for one in fed.of("inference")})
    ]
    return [one.endpoint for one in facts if isinstance(one, InferenceFacts) and one.endpoint]


def code_of(fed: Federation) -> CodeFacts:
    facts = fed.last("code").facts
    assert isinstance(facts, CodeFacts)
    return facts


def run_facts(fed: Federation, number: int) -> RunFacts:
    facts = fed.last("run", f"tiny-{number}").facts
    assert isinstance(facts, RunFacts)
    return facts


async def test_a_commit_leads_to_new_code_a_new_run_a_new_version_and_new_predictions(
    fed: Federation, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    async with whole(fed, clients=2), requests_flowing(fed) as asked:
        first = await ended(fed, await start_run(fed))
        assert (first.code_version, await trained(fed)) == (old, 2.0)

        new = repository.commit({"tiny/client_app.py": TWICE_AS_FAST}, subject="twice as fast", by=ada)
        await fed.happens("code", "rollout_finished", within_s=60)  # it looks by itself
        second = await ended(fed, "tiny-2")

        assert (second.trigger, second.code_version) == ("new code", new)
        assert await trained(fed) == 6.0  # two rounds by one, two rounds by two
        assert code_of(fed).code_version == new
        await fed.until(lambda: asked.versions[-2:] == [3, 3])
    assert asked.failed == []
    assert sorted(set(asked.versions)) == [1, 2, 3]


async def test_code_that_fails_in_training_goes_back_by_itself_and_costs_no_prediction(
    fed: Federation, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    async with whole(fed, clients=2), requests_flowing(fed) as asked:
        await ended(fed, await start_run(fed))
        bad = repository.commit({"tiny/client_app.py": BROKEN}, subject="a mistake", by=ada)
        await fed.bus.request(LookForCode(task="tiny"), timeout_s=60)
        back = await fed.happens("code", "rollout_reverted", within_s=60)
        assert bad[:12] in back.reason
        assert bad in code_of(fed).rejected
        await fed.happens("client", "code_ready", "c1.tiny", times=2, within_s=60)  # there, and back
        await fed.until(lambda: settled(fed), within_s=60)
        again = await ended(fed, await start_run(fed))
        assert again.code_version == old
    assert asked.failed == []


async def test_code_that_makes_the_model_worse_goes_back_and_its_model_is_not_served(
    fed: Federation, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    async with whole(fed, clients=2), requests_flowing(fed) as asked:
        await ended(fed, await start_run(fed))
        repository.commit({"tiny/client_app.py": BACKWARDS}, subject="the wrong way", by=ada)
        await fed.bus.request(LookForCode(task="tiny"), timeout_s=60)
        assert "kept back" in (await fed.happens("code", "rollout_reverted", within_s=60)).reason
        assert code_of(fed).code_version == old
        assert not run_facts(fed, 2).promoted
        await fed.until(lambda: settled(fed), within_s=60)
        assert set(served(fed).values()) == {2}
    assert asked.failed == []
    assert 3 not in asked.versions


async def test_a_rollback_reaches_every_client_within_seconds_and_one_that_was_away_when_it_returns(
    fed: Federation, repository: Repository
) -> None:
    async with whole(fed, clients=2) as everyone:
        await ended(fed, await start_run(fed))
        for agent in everyone["c2"].values():
            await agent.kill()
        async with requests_flowing(fed):
            await fed.bus.request(RollBackModel(task="tiny"))
            await fed.until(lambda: served(fed)["c1"] == 1, within_s=10)
        for agent in everyone["c2"].values():
            agent.start()
        await fed.until(lambda: served(fed) == {"c1": 1, "c2": 1}, within_s=30)
        await fed.until(lambda: settled(fed), within_s=30)
