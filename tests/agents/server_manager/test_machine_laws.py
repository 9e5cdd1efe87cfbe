"""Laws of the server manager's decisions, over random orders of messages, requests, timers and results."""

from collections.abc import Callable, Sequence
from random import Random

import pytest
from support.server_machine import NAME, NEW, NOW, OLD, PLAN, artifact, blob, champion, manifest, task_at

from fedbus.agents.common.machine import (
    FinishStartup,
    Publish,
    Reply,
    RequestId,
    RetryLater,
    StartTimer,
    TimerFired,
)
from fedbus.agents.server_manager.effects import (
    BuildFirstModel,
    BuildLineage,
    CheckFit,
    CheckPromotion,
    CheckStore,
    Effect,
    FindFlowerServer,
    MoveCode,
    MoveServer,
    OfferModel,
    PromoteVersion,
    PublishVersion,
    ReadFleet,
    ReadJoined,
    ReadRecruits,
    RequestCandidateRun,
    RetireVersions,
    StartFlowerServer,
)
from fedbus.agents.server_manager.events import (
    CancelRequested,
    CandidateRunAnswered,
    ChampionDetails,
    CodeProposed,
    CodeRejectedByCheck,
    CodeUnusable,
    Event,
    FirstModelFailed,
    FirstModelReady,
    FitChecked,
    FleetRead,
    FlowerServerFound,
    FlowerServerNotStarted,
    FlowerServerStarted,
    FollowingPaused,
    FollowingResumed,
    JoinedRead,
    LineageBuilt,
    LineageFailed,
    LineageRequested,
    ManagerStarted,
    ModelOffered,
    OfferFailed,
    PromotionChecked,
    PromotionRefused,
    PromotionRequested,
    ProposedVersion,
    PublishFailed,
    RecruitsRead,
    RevertRequested,
    RunRequested,
    StoreChecked,
    TimerName,
    VersionPromoted,
    VersionPublished,
    VersionsRetired,
)
from fedbus.agents.server_manager.machine import ServerMachine
from fedbus.agents.server_manager.records import CodeRecord, ServerRecord
from fedbus.contracts.champion import PromoteModel, RollBackModel, StartLineage
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CODE, CodeData, CodeEvent, CodeReady, CodeRefused, CodeState
from fedbus.contracts.flower_server import RoundFinished, RunFailed, RunFinished, ServerLost, ServerStarted
from fedbus.contracts.message import Refused
from fedbus.contracts.run import RoundResult
from fedbus.contracts.server import (
    SERVER,
    CancelRun,
    OpenRun,
    ServerClosed,
    ServerData,
    ServerEvent,
    ServerState,
    StoreProblem,
)
from fedbus.domain.model_promotion import PromotionVerdict

Jobs = (
    BuildFirstModel
    | BuildLineage
    | CheckFit
    | CheckPromotion
    | CheckStore
    | FindFlowerServer
    | PublishVersion
    | RequestCandidateRun
    | RetireVersions
    | StartFlowerServer
)
CLIENTS = ("c1", "c2", "c3")
SMALL = PLAN.model_copy(update={"quorum": 1})


class ServerWalk:
    """An agent that performs effects at once, and whose jobs succeed or fail in any order."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.arrows: set[tuple[str, str]] = set()
        """The states that were left, each with the event."""
        self.server = ServerRecord(ServerState.MODEL_INIT, ServerData(task=NAME), ServerEvent.STARTED)
        self.code = CodeRecord(CodeState.STEADY, CodeData(task=NAME, code_version=OLD), CodeEvent.STARTED)
        self.server_log, self.code_log = self.server.state, self.code.state
        """The states that the published transitions lead to."""
        self.machine = ServerMachine(task_at(OLD), self.server, self.code)
        self.jobs: dict[str, Jobs] = {}
        self.timers: set[TimerName] = set()
        self.waiting: list[Event] = []
        """Events that the machine does not accept yet, in order."""
        self.is_ready = False
        self.requests = 0
        self.unanswered: set[RequestId] = set()
        self.runs = 0
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.version = 1
        self.term = 0
        self.fails_queries = False

    # --- the agent ----------------------------------------------------------------------------------

    def decide(self, event: Event) -> None:
        self.waiting.append(event)
        while (ready := next((one for one in self.waiting if self.machine.accepts(one)), None)) is not None:
            self.waiting.remove(ready)
            events: list[Event] = [ready]
            while events:
                events += self.perform(self.machine.handle(events.pop(0), NOW))

    def perform(self, effects: Sequence[Effect]) -> list[Event]:
        return [event for effect in effects for event in self.perform_one(effect)]

    def perform_one(self, effect: Effect) -> list[Event]:  # noqa: PLR0911, PLR0912 - one an effect
        if isinstance(effect, Jobs):
            self.jobs[type(effect).__name__] = effect  # as the agent does: one of each kind
            return []
        match effect:
            case MoveServer(event=event):
                self.arrows.add((self.server_log, event))
                self.server_log = SERVER.advance(self.server_log, event)
            case MoveCode(event=moves):
                self.arrows.add((self.code_log, moves))
                self.code_log = CODE.advance(self.code_log, moves)
            case StartTimer(timer=timer) | RetryLater(timer=timer):
                self.timers.add(timer)
            case Reply(id=id):
                self.unanswered.remove(id)  # raises where a request is answered twice
            case Publish(message=ServerClosed(run=run)):
                self.closed.append(run)
            case FinishStartup():
                self.is_ready = True
            case ReadJoined():
                return [JoinedRead(())]
            case ReadRecruits():
                return [RecruitsRead({}, {}, frozenset(), frozenset())]
            case ReadFleet():
                return [FleetRead({"c1": {}, "c2": {}})]
            case OfferModel(model=offer):
                if self.fails_queries:
                    return [OfferFailed("access denied", StoreProblem.DENIED)]
                return [ModelOffered(offer, blob(offer.version))]
            case PromoteVersion(version=version):
                if self.fails_queries:
                    return [PromotionRefused("access denied")]
                self.term += 1
                return [VersionPromoted(champion(version, self.term))]
            case _:
                pass
        return []

    def next_id(self) -> RequestId:
        self.requests += 1
        self.unanswered.add(RequestId(self.requests))
        return RequestId(self.requests)

    @property
    def run(self) -> str:
        return f"{NAME}-{max(1, self.runs)}"

    # --- what happens -------------------------------------------------------------------------------

    def step(self) -> None:
        """One event: the results of jobs, and messages of the current run, are the most frequent ones."""
        choices: list[tuple[float, Callable[[], None]]] = [
            (1, self.break_or_mend_the_store),
            (0.3, self.restart),
        ]
        if self.jobs:
            choices.append((8, self.end_a_job))
        if self.timers:
            choices.append((1, self.let_a_timer_fire))
        if self.is_ready:
            is_idle = self.machine.health(NOW).state is ServerState.WAITING
            choices += [
                (5 if is_idle else 0, self.open_a_run),
                (6, self.receive_run_message),
                (2, self.ask_for_something),
                (0 if self.machine.rollout.is_rolling else 2, self.propose_code),
                (4, self.answer_for_a_client),
                (1, self.watch_the_code),
            ]
        weights = [weight for weight, _ in choices]
        self.random.choices([do for _, do in choices], weights)[0]()

    def fails(self, share: float = 0.15) -> bool:
        return self.random.random() < share

    def break_or_mend_the_store(self) -> None:
        self.fails_queries = self.fails()

    def start(self) -> None:
        deployed, candidate = self.code.data.code_version, self.code.data.candidate
        lost = CodeUnusable("no such commit")
        self.decide(
            ManagerStarted(
                lost if self.fails(0.05) else task_at(deployed),
                (lost if self.fails() else task_at(candidate)) if candidate else None,
            )
        )

    def restart(self) -> None:
        """A manager that is killed, and one that continues from the log; only the log is left."""
        server, code = self.server, self.code
        self.server = ServerRecord(server.state, server.data, server.event, server.reason)
        self.code = CodeRecord(code.state, code.data, code.event, code.reason)
        self.machine = ServerMachine(task_at(OLD), self.server, self.code)
        self.jobs, self.timers, self.waiting, self.closed = {}, set(), [], []
        self.unanswered, self.is_ready = set(), False
        self.start()

    def watch_the_code(self) -> None:
        found: list[Event] = [
            CodeRejectedByCheck("d" * 40, f"reason {self.random.random()}"),
            FollowingPaused("it does not answer"),
            FollowingResumed(),
        ]
        self.decide(self.random.choice(found))

    def end_a_job(self) -> None:
        name = self.random.choice(sorted(self.jobs))
        self.decide(self.result_of(self.jobs.pop(name), is_failing=self.fails()))

    def let_a_timer_fire(self) -> None:
        timer = self.random.choice(sorted(self.timers))
        self.timers.remove(timer)
        self.decide(TimerFired(timer))

    def open_a_run(self) -> None:
        self.runs += 1
        self.opened.append(self.run)
        request = OpenRun(task=NAME, run=self.run, plan=SMALL)
        self.decide(RunRequested(self.next_id(), request, ""))

    def receive_run_message(self) -> None:
        run, client = self.run, self.random.choice(CLIENTS)
        version = self.machine._server.data.code_version
        result = RoundResult(round=1, participants={client: 1})
        joined = ClientJoined(task=NAME, client=client, run=run, code_version=version)
        finished = RunFinished(task=NAME, run=run, rounds=1, artifact=artifact(50))
        messages: list[Event] = [
            ServerStarted(task=NAME, run=run),
            *(joined, joined),
            RoundFinished(task=NAME, run=run, round=1, result=result),
            *(finished, finished),
            RunFailed(task=NAME, run=run, reason="it raised"),
            ServerLost(task=NAME, run=run, reason="it was killed"),
        ]
        self.decide(self.random.choice(messages))

    def ask_for_something(self) -> None:
        number, version = self.next_id(), self.random.randint(1, 3)
        requests: list[Event] = [
            CancelRequested(number, CancelRun(task=NAME, run=self.run, reason="enough")),
            PromotionRequested(number, PromoteModel(task=NAME, model_version=version)),
            PromotionRequested(number, RollBackModel(task=NAME)),
            LineageRequested(number, StartLineage(task=NAME)),
            RevertRequested(number, "users complain"),
        ]
        self.decide(self.random.choice(requests))

    def propose_code(self) -> None:
        version = self.random.choice((OLD, NEW))
        proposal = ProposedVersion(task_at(version), ("50%", "100%"), new_lineage=self.fails())
        self.decide(CodeProposed(proposal))

    def answer_for_a_client(self) -> None:
        client, version = self.random.choice(CLIENTS), self.random.choice((OLD, NEW))
        if self.fails():
            self.decide(CodeRefused(task=NAME, client=client, code_version=version, reason="it is full"))
        else:
            self.decide(CodeReady(task=NAME, client=client, code_version=version))

    def result_of(self, job: Jobs, *, is_failing: bool) -> Event:  # noqa: PLR0911, PLR0912 - one a job
        reason, trouble = "it does not answer", StoreProblem.UNAVAILABLE
        match job:
            case BuildFirstModel():
                if is_failing:
                    return FirstModelFailed(reason, trouble if self.fails(0.5) else None)
                self.term += 1
                return FirstModelReady(champion(1, self.term), OLD)
            case BuildLineage(code_version=code):
                if is_failing:
                    return LineageFailed(reason)
                return LineageBuilt(self.next_champion(), code)
            case CheckFit():
                return FitChecked("w differs" if is_failing else "")
            case CheckPromotion(version=version):
                return PromotionRefused(reason) if is_failing else PromotionChecked(version or 1)
            case CheckStore(model=checked):
                if is_failing:
                    return StoreChecked(checked, None, has_file=False, reason=reason, trouble=trouble)
                return StoreChecked(checked, champion(checked.version, job.term), has_file=True)
            case FindFlowerServer(run=run):
                return FlowerServerFound(run, is_up=not is_failing, reason="it was killed")
            case PublishVersion():
                if is_failing:
                    return PublishFailed(reason)
                served = self.next_champion()
                if self.fails(0.3):
                    verdict = PromotionVerdict(
                        promote=False, reason="worse", was_compared=not self.fails(0.5)
                    )
                    return VersionPublished(manifest(self.version), verdict, None, keep=20)
                verdict = PromotionVerdict(promote=True, reason="better")
                return VersionPublished(manifest(self.version), verdict, served, keep=20)
            case RetireVersions():
                return VersionsRetired()
            case RequestCandidateRun():
                return CandidateRunAnswered("busy" if is_failing else "")
            case StartFlowerServer(request=request):
                if is_failing:
                    return FlowerServerNotStarted(request.run, Refused(reason=reason))
                return FlowerServerStarted(request.run)

    def next_champion(self) -> ChampionDetails:
        self.version += 1
        self.term += 1
        return champion(self.version, self.term)

    # --- what always holds --------------------------------------------------------------------------

    def check(self) -> None:
        assert self.jobs or not self.waiting, "an event waits, and no job is in progress"
        assert self.jobs or not self.unanswered, "a request is forgotten"
        assert len(self.closed) == len(set(self.closed)), "a run ends twice"
        assert set(self.closed) <= set(self.opened)
        assert (self.server_log, self.code_log) == (self.server.state, self.code.state)
        _ = self.server.situation  # raises where the data of the state is missing


def walked(seed: int) -> ServerWalk:
    walk = ServerWalk(seed)
    walk.start()
    for _ in range(300):
        walk.step()
        walk.check()
    return walk


@pytest.mark.parametrize("seed", range(10))
def test_no_order_of_events_breaks_the_server(seed: int) -> None:
    walked(seed)


def test_the_walks_take_every_arrow_of_server_and_code() -> None:
    taken = {arrow for seed in range(100) for arrow in walked(seed).arrows}
    assert {(str(state), str(event)) for state, event in (*SERVER.arrows, *CODE.arrows)} - taken == set()
