"""New code, from the commit to everybody or back: a real repository, a real bus; the clients are played."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.federation import TASK, TINY, AgentAtWork, Federation
from support.followed import tiny_repository
from support.played_flower import FlowerServerPlayed
from support.repositories import Repository, Signer, signer

from fedbus.agents import flower_asked, server_manager
from fedbus.agents.server_manager import ServerManager
from fedbus.bus.errors import RequestRefused
from fedbus.bus.lives import Lives
from fedbus.contracts.client import CLIENT, ClientFacts, Joined
from fedbus.contracts.code import (
    CheckCode,
    CodeFacts,
    CodePublished,
    CodeReady,
    CodeRefused,
    LookForCode,
    RevertCode,
    RollOutCode,
)
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.run import RoundResult, RunOverrides, RunPlan, RunStarted, StartRun, StopRun
from fedbus.contracts.server import (
    BeginTraining,
    GetServerInfo,
    OpenRun,
    RunFinished,
    StartServer,
)
from fedbus.contracts.versions import RollBackModel
from fedbus.stores.code import CodeRepository, open_code

REVISED = {"tiny/__init__.py": "REVISION = 2\n"}
PLAN = RunPlan(rounds=1, quorum=2, recruit_s=30, round_s=30)


@dataclass
class Others(FlowerServerPlayed):
    """Everybody whom the server manager talks to, played: the Flower server, the scheduler, the clients."""

    checks_until: asyncio.Event | None = None
    """How long a check takes."""
    hindered: str = ""
    """Why nothing can be checked or started now."""
    passes: bool = True
    """Whether that may pass by itself."""
    asked_to_run: list[StartRun] = field(default_factory=list)

    @asynccontextmanager
    async def there(self) -> AsyncIterator[None]:
        scheduler = await self.fed.speaker("workflow-scheduler")
        asked: dict[Any, Any] = {StartRun: self._run, StopRun: self._run}
        async with self.serving(), scheduler.serve(asked, task=TASK, version="1.0.0"):
            yield

    async def clients(self, *names: str, **labels: str) -> None:
        """Clients that the log knows."""
        for name in names:
            async with Lives.open(await self.fed.speaker("client-manager", name)) as lives:
                life = await lives.of(CLIENT, ClientFacts(task=TASK, client=name, labels=labels))
                await life.bear("started")

    async def ready(self, client: str, version: str) -> None:
        said = CodeReady(task=TASK, client=client, code_version=version)
        await self.fed.say(said, by="client-manager")

    async def refuses(self, client: str, version: str, reason: str, attempt: int | None = None) -> None:
        said = CodeRefused(task=TASK, client=client, code_version=version, reason=reason, attempt=attempt)
        await self.fed.say(said, by="client-manager")

    async def run(
        self, number: int, version: str, *clients: str, loss: float = 0.5, failures: tuple[str, ...] = ()
    ) -> None:
        """A run of *version* with these clients, from its opening to its end."""
        async with self.in_a_run(number, version, *clients, loss=loss, failures=failures):
            pass

    @asynccontextmanager
    async def in_a_run(
        self, number: int, version: str, *clients: str, loss: float = 0.5, failures: tuple[str, ...] = ()
    ) -> AsyncIterator[None]:
        """The same, which trains while the block runs."""
        await self.begin(number, PLAN, *clients, version=version)
        yield
        participants = {one: 10 for one in clients if one not in failures}
        failed = dict.fromkeys(failures, "it raised ValueError")
        result = RoundResult(round=1, metrics={"loss": loss}, participants=participants, failures=failed)
        await self.end(number, result)

    async def takes_up(
        self, server: "Server", files: dict[str, str], repository: Repository, by: Signer
    ) -> str:
        """A commit that two clients have taken up and a run has tried, so that everybody is on it."""
        await self.clients("c1", "c2")
        new = repository.commit(files, by=by)
        await server.look()
        for client in ("c1", "c2"):
            await self.ready(client, new)
        await self.fed.until(lambda: bool(self.asked_to_run), "a run of the candidate to be asked for")
        await self.run(1, new, "c1", "c2")
        await self.fed.happens("code", "rollout_finished")
        return new

    async def check(self, request: CheckCode) -> Body:
        answer = await super().check(request)
        if self.checks_until is not None:
            await self.checks_until.wait()
        return Refused(reason=self.hindered, passing=True) if self.hindered else answer

    async def start(self, request: StartServer) -> Body:
        if self.hindered:
            return Refused(reason=self.hindered, passing=self.passes, blameless=True)
        return await super().start(request)

    async def _run(self, request: StartRun) -> Body:
        self.asked_to_run.append(request)
        return RunStarted(run=f"{TASK}-1")


@pytest.fixture
async def others(fed: Federation) -> AsyncIterator[Others]:
    others = Others(fed)
    await others.store.prepare()
    async with others.there():
        yield others


@pytest.fixture(scope="module")
def ada(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return signer("ada", tmp_path_factory.mktemp("keys"))


@pytest.fixture
def repository(tmp_path: Path, ada: Signer) -> Repository:
    return tiny_repository(tmp_path / "repository", by=ada)


@pytest.fixture
def code(repository: Repository, ada: Signer, tmp_path: Path) -> CodeRepository:
    signers = tmp_path / "allowed_signers"
    signers.write_text(ada.line())
    return open_code(f"{repository.url}@main", tmp_path / "home", signers=signers)


def stages(*stages: str, **table: object) -> str:
    """The task's table, with a rollout in these stages."""
    shares = ", ".join(f'"{one}"' for one in stages)
    more = "\n".join(f"{name.replace('_', '-')} = {value}" for name, value in table.items())
    return f"{(TINY / 'pyproject.toml').read_text()}\n[tool.fedbus.rollout]\nstages = [{shares}]\n{more}\n"


def laid_out(directory: Path, version: str) -> bool:
    """Whether the server has the files of *version*."""
    return any(directory.glob(f"home/code/*/{version}/pyproject.toml"))


class Server:
    """The server manager at work."""

    def __init__(self, fed: Federation, code: CodeRepository, agent: AgentAtWork) -> None:
        self.fed, self.code, self.agent = fed, code, agent

    async def look(self) -> str:
        return str((await self.fed.bus.request(LookForCode(task=TASK), timeout_s=30)).news)

    @property
    def facts(self) -> CodeFacts:
        facts = self.fed.last("code").facts
        assert isinstance(facts, CodeFacts)
        return facts


@pytest.fixture
async def server(fed: Federation, others: Others, code: CodeRepository) -> AsyncIterator[Server]:
    first = await code.task_at(await code.newest())

    async def manage(stop: asyncio.Event) -> None:
        async with fed.site.bus("server-manager") as bus:
            await ServerManager(bus, first, others.store, code=code).run(stop)

    async with fed.agent(manage) as agent:
        await fed.hears(CodePublished)
        yield Server(fed, code, agent)


# --- everybody at once ---------------------------------------------------------------------------


async def test_a_commit_comes_to_everybody_is_tried_by_a_run_and_stays(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    await others.clients("c1", "c2")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await server.look()
    told = await fed.hears(CodePublished, times=2)
    assert (told.code_version, told.candidate, told.cohort.up_to) == (old, new, 1.0)

    await others.ready("c1", new)
    await others.ready("c2", new)
    await fed.until(lambda: bool(others.asked_to_run), "a run of the candidate to be asked for")
    assert others.asked_to_run[0].trigger == "new code"
    await others.run(1, new, "c1", "c2")

    await fed.happens("code", "rollout_finished")
    assert fed.events("code") == ["started", "code_found", "stage_ready", "rollout_finished"]
    assert (server.facts.code_version, server.facts.previous, server.facts.candidate) == (new, (old,), "")
    await fed.until(lambda: fed.heard(CodePublished)[-1].code_version == new, "everybody to be told")
    assert (others.starts[0].code_version, fed.server().code_version) == (new, new)


async def test_the_first_model_and_each_run_name_the_code_that_they_are_made_of(
    fed: Federation, server: Server, others: Others, repository: Repository
) -> None:
    await others.run(1, repository.head, "c1", "c2")
    assert others.built[0].code_version == repository.head
    latest = await others.store.latest()
    assert latest is not None
    assert latest.code_version == repository.head


async def test_old_code_is_removed_without_what_is_being_checked(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer, tmp_path: Path
) -> None:
    await others.clients("c1", "c2")
    second = repository.commit(REVISED, by=ada)
    await server.look()
    for client in ("c1", "c2"):
        await others.ready(client, second)
    await fed.until(lambda: bool(others.asked_to_run))
    others.checks_until = asyncio.Event()
    async with others.in_a_run(1, second, "c1", "c2"):
        third = repository.commit({"tiny/__init__.py": "REVISION = 3\n"}, by=ada)
        looking = asyncio.ensure_future(server.look())
        await fed.until(lambda: others.checked[-1].code_version == third, "it to be checked")
    await fed.happens("code", "rollout_finished")
    for _ in range(3):
        await server.code.history()  # behind whatever is at work there
    others.checks_until.set()
    assert "is tried by" in await looking
    assert laid_out(tmp_path, third)


async def test_a_commit_during_a_run_waits_for_its_end(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN))
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    assert await server.look() == "it is rolled out when the run that is under way has ended"
    for client in ("c1", "c2"):
        joined = Joined(task=TASK, client=client, run=f"{TASK}-1", code_version=old)
        await fed.say(joined, by="trainer")
    await fed.hears(BeginTraining)
    assert fed.events("code") == ["started"]
    artifact = await others.artifact()
    await fed.say(RunFinished(task=TASK, run=f"{TASK}-1", rounds=1, artifact=artifact), by="flower-server")
    await fed.happens("code", "code_found")
    assert server.facts.candidate == new


# --- what is no version --------------------------------------------------------------------------


async def test_an_unsigned_commit_is_rejected_and_nobody_is_told_to_take_it(
    fed: Federation, server: Server, repository: Repository
) -> None:
    unsigned = repository.commit({"tiny/__init__.py": "REVISION = 2\n"})
    assert "it is not signed" in await server.look()
    await fed.happens("code", "code_rejected")
    assert unsigned in server.facts.rejected
    assert all(told.candidate != unsigned for told in fed.heard(CodePublished))


async def test_a_stranger_s_commit_is_rejected(
    fed: Federation, server: Server, repository: Repository, tmp_path: Path
) -> None:
    (tmp_path / "stranger").mkdir()
    forged = repository.commit({"tiny/__init__.py": "X = 1\n"}, by=signer("eve", tmp_path / "stranger"))
    await server.look()
    await fed.happens("code", "code_rejected")
    assert forged in server.facts.rejected


async def test_a_commit_whose_check_fails_is_rejected_once_and_not_again(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    broken = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    others.broken[broken] = "module 'tiny.client_app' cannot be imported"
    await server.look()
    assert "cannot be imported" in (await fed.happens("code", "code_rejected")).reason
    assert (await server.look()).startswith("nothing new: it was rejected:")
    assert len(others.checked) == 1


async def test_another_architecture_is_rejected_with_the_tensor_that_differs_and_how_to_begin_anew(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    other = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    others.differs[other] = "weight is float32 (4, 3) there and float32 (5, 3) here"
    await server.look()
    reason = (await fed.happens("code", "code_rejected")).reason
    assert "weight is float32 (4, 3)" in reason
    assert "--new-lineage" in reason


async def test_a_history_that_was_rewritten_behind_us_is_not_followed_until_somebody_says_so(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1")
    old = repository.head
    repository.git("commit", "--quiet", "--amend", "-m", "another past", by=ada)
    assert "rewritten" in await server.look()
    assert server.facts.code_version == old
    await fed.bus.request(RollOutCode(task=TASK, code_version=repository.head), timeout_s=30)
    assert (await fed.happens("code", "code_found")).facts.candidate == repository.head  # type: ignore[union-attr]


# --- what passes ---------------------------------------------------------------------------------


async def test_a_commit_that_cannot_be_checked_now_is_not_rejected_and_taken_when_it_can(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    new = repository.commit(REVISED, by=ada)
    others.hindered = "cannot use s3://models: it does not answer"
    with pytest.raises(RequestRefused, match="cannot be checked: cannot use s3://models"):
        await server.look()
    told = await fed.happens("code", "following_held_up")
    assert "does not answer" in told.reason
    assert server.facts.held_up == told.reason
    others.hindered = ""
    await server.look()
    await fed.happens("code", "following_resumed")
    assert (server.facts.held_up, server.facts.rejected, server.facts.candidate) == ("", {}, new)


@pytest.mark.parametrize(
    ("hindrance", "passes"),
    [
        ("cannot use s3://models: it does not answer", True),
        ("models/1.safetensors is damaged: restore it from a copy", False),
    ],
    ids=["away", "damaged"],
)
async def test_a_run_that_a_store_hinders_is_no_fault_of_its_code_and_another_one_tries_it(
    hindrance: str,
    passes: bool,
    fed: Federation,
    server: Server,
    others: Others,
    repository: Repository,
    ada: Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flower_asked, "START_TIMEOUT_S", 1.0)
    monkeypatch.setattr(server_manager, "HINDERED_S", 0.1)
    await others.clients("c1", "c2")
    new = repository.commit(REVISED, by=ada)
    await server.look()
    for client in ("c1", "c2"):
        await others.ready(client, new)
    await fed.until(lambda: bool(others.asked_to_run))
    others.hindered, others.passes = hindrance, passes
    with pytest.raises(RequestRefused, match=re.escape(hindrance)):
        await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN), timeout_s=10)
    others.hindered = ""
    await fed.until(lambda: len(others.asked_to_run) == 2, "another run to be asked for")
    assert (server.facts.candidate, server.facts.rejected) == (new, {})


async def test_a_repository_that_is_away_is_said_once_and_when_it_is_back(
    fed: Federation, server: Server, others: Others, repository: Repository
) -> None:
    away = repository.path.rename(repository.path.with_name("away"))
    for _ in range(3):
        with pytest.raises(RequestRefused, match="see that it is there"):
            await server.look()
    await fed.happens("code", "following_held_up")
    away.rename(repository.path)
    await server.look()
    await fed.happens("code", "following_resumed")
    assert fed.events("code") == ["started", "following_held_up", "following_resumed"]


async def test_a_commit_whose_signer_becomes_an_allowed_one_is_looked_at_again(
    fed: Federation, server: Server, others: Others, repository: Repository, tmp_path: Path
) -> None:
    bob = signer("bob", tmp_path)
    new = repository.commit(REVISED, by=bob)
    assert "not that of an allowed signer" in await server.look()
    assert (await server.look()).startswith("nothing new: it was rejected")
    with (tmp_path / "allowed_signers").open("a") as allowed:
        allowed.write(bob.line())
    assert "is tried by" in await server.look()
    assert (server.facts.candidate, server.facts.rejected, server.facts.not_signed) == (new, {}, ())


async def test_a_restarted_manager_looks_again_at_what_nobody_allowed_had_signed_and_rejects_it_without_a_word(
    fed: Federation, server: Server, others: Others, repository: Repository, tmp_path: Path
) -> None:
    repository.commit(REVISED, by=signer("bob", tmp_path))
    await server.look()
    await fed.happens("code", "code_rejected")
    await server.agent.restart()
    await fed.hears(CodePublished, times=2)
    await server.look()
    assert fed.events("code") == ["started", "code_rejected"]


# --- stages --------------------------------------------------------------------------------------


async def test_a_share_of_the_clients_comes_first_and_the_others_after_a_good_run(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    fleet = [f"c{number}" for number in range(1, 6)]
    await others.clients(*fleet)
    new = repository.commit({"pyproject.toml": stages("40%", "100%")}, by=ada)
    await server.look()
    first = (await fed.happens("code", "code_found")).facts
    assert isinstance(first, CodeFacts)
    assert len(first.clients) == 2

    for client in first.clients:
        await others.ready(client, new)
    await fed.until(lambda: bool(others.asked_to_run))
    await others.run(1, new, *first.clients)
    second = (await fed.happens("code", "stage_passed")).facts
    assert isinstance(second, CodeFacts)
    assert sorted(second.clients) == fleet

    for client in set(fleet) - set(first.clients):
        await others.ready(client, new)
    await fed.until(lambda: len(others.asked_to_run) == 2)
    await others.run(2, new, *fleet)
    await fed.happens("code", "rollout_finished")


async def test_a_run_of_a_small_cohort_asks_for_no_larger_quorum_than_it_has(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1", "c2", "c3")
    new = repository.commit({"pyproject.toml": stages("10%", "100%")}, by=ada)
    await server.look()
    (only,) = (await fed.happens("code", "code_found")).facts.clients  # type: ignore[union-attr]
    await others.ready(only, new)
    await fed.until(lambda: bool(others.asked_to_run))
    await others.run(1, new, only)  # the plan's quorum is 2
    await fed.happens("code", "stage_passed")


async def test_a_run_of_the_candidate_is_as_its_own_task_says_and_what_was_asked_for_stands_over_that(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1", "c2")
    own = (TINY / "pyproject.toml").read_text().replace("\nrounds = 2", "\nrounds = 5")
    new = repository.commit({"pyproject.toml": own}, by=ada)
    await server.look()
    for client in ("c1", "c2"):
        await others.ready(client, new)
    await fed.until(lambda: bool(others.asked_to_run))
    asked = RunOverrides(quorum=2, config={"lr": 0.1})
    await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN, overrides=asked))
    (started,) = others.starts
    assert (started.code_version, started.plan.rounds) == (new, 5)
    assert (started.plan.quorum, started.plan.config) == (2, {"lr": 0.1})
    assert fed.server().plan == started.plan


async def test_a_client_with_the_old_code_does_not_join_the_candidate_s_run(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    await others.clients("c1", "c2")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await server.look()
    for client in ("c1", "c2"):
        await others.ready(client, new)
    await fed.until(lambda: bool(others.asked_to_run))
    await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN))
    for client, version in (("c1", old), ("c1", new), ("c2", new)):
        joined = Joined(task=TASK, client=client, run=f"{TASK}-1", code_version=version)
        await fed.say(joined, by="trainer")
    assert (await fed.hears(BeginTraining)).cohort == ("c1", "c2")


async def test_labels_choose_a_stage_s_clients(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1", "c2", site="ward")
    await others.clients("c3", site="lab")
    repository.commit({"pyproject.toml": stages("site=lab", "100%")}, by=ada)
    await server.look()
    facts = (await fed.happens("code", "code_found")).facts
    assert isinstance(facts, CodeFacts)
    assert facts.clients == ("c3",)


async def test_a_stage_that_nobody_is_in_is_refused_by_hand_with_the_labels_that_there_are(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1", site="ward")
    new = repository.commit(REVISED, by=ada)
    request = RollOutCode(task=TASK, code_version=new, stages=("site=nowhere", "100%"))
    with pytest.raises(RequestRefused, match="no client has site=nowhere: there are site=ward"):
        await fed.bus.request(request, timeout_s=30)


async def test_a_stage_that_nobody_answers_in_is_told_once_and_goes_on_with_who_comes(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1", site="ward")
    new = repository.commit({"pyproject.toml": stages("site=lab", "100%", wait_s=0.3)}, by=ada)
    await server.look()
    told = await fed.happens("code", "stage_unanswered")
    assert told.reason.startswith("stage site=lab: no client is in it; it waits on")
    await others.clients("c2", site="lab")
    await others.ready("c2", new)
    await fed.happens("code", "stage_ready")
    assert fed.events("code").count("stage_unanswered") == 1


async def test_what_a_device_refused_in_an_earlier_rollout_counts_no_more_over_a_restart(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1")
    new = repository.commit(REVISED, by=ada)
    await server.look()
    await fed.happens("code", "code_found")
    await others.refuses("c1", new, "it is not installed", attempt=1)
    await fed.happens("code", "rollout_reverted")
    await fed.bus.request(RollOutCode(task=TASK, code_version=new), timeout_s=30)
    told = await fed.hears(CodePublished, times=4)
    assert (told.candidate, told.attempt) == (new, 2)
    await server.agent.restart()
    await others.ready("c1", new)
    await fed.happens("code", "stage_ready")
    assert fed.events("code").count("rollout_reverted") == 1


async def test_who_is_silent_is_waited_for_only_so_long(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1", "c2")
    new = repository.commit({"pyproject.toml": stages("100%", wait_s=1.0)}, by=ada)
    await server.look()
    await fed.happens("code", "code_found")
    await others.ready("c1", new)
    ready = await fed.happens("code", "stage_ready")
    assert ready.reason == "without c2"


# --- back ----------------------------------------------------------------------------------------


async def test_failing_trainings_send_everybody_back_by_themselves(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    await others.clients("c1", "c2")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await server.look()
    for client in ("c1", "c2"):
        await others.ready(client, new)
    await fed.until(lambda: bool(others.asked_to_run))
    await others.run(1, new, "c1", "c2", failures=("c2",))
    back = await fed.happens("code", "rollout_reverted")
    assert "1 of 2 trainings failed" in back.reason
    assert (server.facts.code_version, server.facts.candidate) == (old, "")
    assert fed.heard(CodePublished)[-1].plan.code_version == old
    assert (await server.look()).startswith("nothing new: it was rejected")


async def test_a_model_that_is_worse_sends_everybody_back_and_is_not_served(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.run(1, repository.head, "c1", "c2", loss=0.2)
    await others.clients("c1", "c2")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await server.look()
    for client in ("c1", "c2"):
        await others.ready(client, new)
    await fed.until(lambda: bool(others.asked_to_run))
    await others.run(2, new, "c1", "c2", loss=2.0)
    assert "kept back" in (await fed.happens("code", "rollout_reverted")).reason
    assert fed.events("server")[-1] == "candidate_kept"
    info = await fed.bus.request(GetServerInfo(task=TASK))
    assert info.model.version == 2


async def test_a_promotion_by_hand_in_the_candidate_s_run_is_not_laid_at_its_code_s_door_and_it_is_tried_again(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.run(1, repository.head, "c1", "c2", loss=0.2)
    await others.clients("c1", "c2")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await server.look()
    for client in ("c1", "c2"):
        await others.ready(client, new)
    await fed.until(lambda: bool(others.asked_to_run))
    async with others.in_a_run(2, new, "c1", "c2", loss=0.1):
        await fed.bus.request(RollBackModel(task=TASK))
    assert "version 1 has been served since" in (await fed.happens("server", "candidate_kept")).reason
    await fed.until(lambda: len(others.asked_to_run) == 2, "another run of the candidate to be asked for")
    await others.run(3, new, "c1", "c2", loss=0.1)
    await fed.happens("code", "rollout_finished")
    assert (server.facts.code_version, server.facts.rejected) == (new, {})


async def test_devices_that_refuse_send_it_back_before_any_run(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1", "c2")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await server.look()
    await fed.happens("code", "code_found")
    await others.refuses("c1", new, "it needs scikit-learn, which may not be installed here")
    assert "scikit-learn" in (await fed.happens("code", "rollout_reverted")).reason
    assert others.asked_to_run == []


async def test_a_person_goes_back_to_the_version_before(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    new = await others.takes_up(server, REVISED, repository, ada)
    begun = await fed.bus.request(RevertCode(task=TASK, reason="users complain"), timeout_s=30)
    assert (begun.code_version, begun.stages) == (old, ("100%",))
    assert server.facts.candidate == old
    assert server.facts.rejected == {new: "users complain"}


async def test_going_back_twice_does_not_lead_to_what_was_left(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    await others.takes_up(server, REVISED, repository, ada)
    await fed.bus.request(RevertCode(task=TASK), timeout_s=30)
    for client in ("c1", "c2"):
        await others.ready(client, old)
    await fed.until(lambda: len(others.asked_to_run) == 2)
    await others.run(2, old, "c1", "c2")
    await fed.happens("code", "rollout_finished", times=2)
    with pytest.raises(RequestRefused, match=f"no version before {old[:12]} that was not left or rejected"):
        await fed.bus.request(RevertCode(task=TASK), timeout_s=30)


async def test_going_back_to_another_architecture_changes_nothing_and_names_the_way(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    await others.takes_up(server, REVISED, repository, ada)
    others.differs[old] = "weight is float32 (4, 3) there and float32 (5, 3) here"
    before, told = server.facts, fed.events("code")
    with pytest.raises(RequestRefused, match=r"nothing was changed: .* --new-lineage"):
        await fed.bus.request(RevertCode(task=TASK), timeout_s=30)
    assert (server.facts, fed.events("code")) == (before, told)


async def test_a_person_goes_back_while_the_repository_is_away(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    await others.takes_up(server, REVISED, repository, ada)
    repository.path.rename(repository.path.with_name("elsewhere"))
    begun = await fed.bus.request(RevertCode(task=TASK), timeout_s=30)
    assert begun.code_version == server.facts.candidate == old


async def test_who_goes_back_during_a_run_leaves_the_version_when_the_run_is_over(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    new = await others.takes_up(server, REVISED, repository, ada)
    async with others.in_a_run(2, new, "c1", "c2"):
        await fed.bus.request(RevertCode(task=TASK, reason="users complain"), timeout_s=30)
        assert (server.facts.rejected, server.facts.candidate) == ({}, "")
    await fed.happens("code", "code_found", times=2)
    assert (server.facts.rejected, server.facts.candidate) == ({new: "users complain"}, old)


async def test_who_goes_back_further_during_a_rollout_leaves_the_candidate_and_what_was_before_it(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    first = repository.head
    second = await others.takes_up(server, REVISED, repository, ada)
    third = repository.commit({"tiny/__init__.py": "REVISION = 3\n"}, by=ada)
    await server.look()
    await fed.happens("code", "code_found", times=2)
    await fed.bus.request(RevertCode(task=TASK, to=first[:12], reason="both are bad"), timeout_s=30)
    await fed.happens("code", "code_found", times=3)
    assert server.facts.candidate == first
    assert server.facts.rejected == dict.fromkeys((second, third), "both are bad")


async def test_a_person_ends_a_rollout(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    old = repository.head
    await others.clients("c1")
    repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await server.look()
    await fed.happens("code", "code_found")
    begun = await fed.bus.request(RevertCode(task=TASK))
    assert begun.code_version == old
    await fed.happens("code", "rollout_reverted")


async def test_what_is_not_there_is_refused_in_words(fed: Federation, server: Server) -> None:
    with pytest.raises(RequestRefused, match="there is no version before"):
        await fed.bus.request(RevertCode(task=TASK))
    with pytest.raises(RequestRefused):
        await fed.bus.request(RollOutCode(task=TASK, code_version="feedface"), timeout_s=30)


# --- a manager that comes back ---------------------------------------------------------------------


async def test_a_manager_that_comes_back_in_a_rollout_goes_on_with_it(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1", "c2")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    await server.look()
    await fed.happens("code", "code_found")
    await others.ready("c1", new)
    await server.agent.restart()
    await others.ready("c2", new)
    await fed.happens("code", "stage_ready")
    await fed.until(lambda: bool(others.asked_to_run))
    await others.run(1, new, "c1", "c2")
    await fed.happens("code", "rollout_finished")


async def test_a_new_lineage_is_begun_with_the_code_that_makes_it(
    fed: Federation, server: Server, others: Others, repository: Repository, ada: Signer
) -> None:
    await others.clients("c1")
    new = repository.commit({"tiny/__init__.py": "REVISION = 2\n"}, by=ada)
    others.differs[new] = "weight is another"
    await server.look()
    await fed.happens("code", "code_rejected")
    others.differs.clear()
    await fed.bus.request(RollOutCode(task=TASK, code_version=new, new_lineage=True), timeout_s=30)
    await others.ready("c1", new)
    await fed.happens("server", "lineage_started")
    await fed.happens("code", "rollout_finished")
    latest = await others.store.latest()
    assert latest is not None
    assert (latest.version, latest.parent, latest.lineage, latest.code_version) == (2, None, 2, new)
    assert (await fed.bus.request(GetServerInfo(task=TASK))).model.version == 2
