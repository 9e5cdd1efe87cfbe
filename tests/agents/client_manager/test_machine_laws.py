"""Laws of the client manager's decisions, over random orders of messages, timers and results."""

from collections.abc import Callable
from random import Random

import pytest
from support.client_machine import (
    CLIENT_ID,
    LABELS,
    infer_ready,
    infer_refused,
    make_invitation,
    model_announced,
    model_rolled_back,
    server_info,
)
from support.server_machine import NAME, NEW, NOW, OLD, RUN, task_at

from fedbus.agents.client_manager.effects import (
    Effect,
    EnrollClient,
    Fail,
    FetchModel,
    HandOverModel,
    MoveClient,
    PrepareCode,
    ReadDeviceFacts,
    ReadOpenRun,
    ReadServerInfo,
    ReleaseSlot,
    SwitchCode,
    TakeSlot,
)
from fedbus.agents.client_manager.events import (
    ClientManagerStarted,
    ClientTimer,
    CodeNotPrepared,
    CodePrepared,
    DeviceFactsRead,
    EnrollmentAnswered,
    Event,
    ModelFetched,
    ModelNotFetched,
    OpenRunRead,
    ServerInfoRead,
    SlotsBusy,
    SlotTaken,
)
from fedbus.agents.client_manager.machine import ClientMachine
from fedbus.agents.client_manager.records import ClientRecord
from fedbus.agents.client_manager.steps import (
    Applying,
    AwaitingVersion,
    Ended,
    FirstRefused,
    Ready,
    SearchFailed,
    Training,
    TryingCode,
)
from fedbus.agents.common.machine import CancelTimer, FinishStartup, RetryLater, StartTimer, TimerFired
from fedbus.contracts.client import CLIENT, ClientData, ClientEvent, ClientState, FailTrain, FinTrain
from fedbus.contracts.code import CodePlan, CodePublished
from fedbus.contracts.model import ModelRef
from fedbus.contracts.server import UpdateReady
from fedbus.contracts.situations import client_situation

ClientJobs = EnrollClient | ReadServerInfo | ReadOpenRun | FetchModel | PrepareCode

WAITS_FOR_TIMER = {
    SearchFailed: ClientTimer.MODEL,
    FirstRefused: ClientTimer.REFUSED,
    AwaitingVersion: ClientTimer.VERSION,
    TryingCode: ClientTimer.APPLY,
    Training: ClientTimer.LEARN,
}
"""The timer that ends a step, whatever the other agents do."""


class ClientWalk:
    """An agent that performs effects at once, and whose jobs succeed or fail in any order.

    The inference agent serves what it accepted last; it may refuse a model, roll back, and lose everything.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.arrows: set[tuple[str, str]] = set()
        """The states that were left, each with the event."""
        data = ClientData(task=NAME, client=CLIENT_ID, code_version=OLD, labels=LABELS)
        self.record = ClientRecord(ClientState.S0, data, ClientEvent.STARTED)
        self.log = self.record.state
        """The state that the published transitions lead to."""
        self.code = OLD
        """The version that the device remembers on disk."""
        self.jobs: dict[str, ClientJobs] = {}
        self.timers: set[ClientTimer] = set()
        self.is_ready = False
        self.has_slot = False
        self.files: set[int] = set()
        self.asked: list[HandOverModel] = []
        """The models that the inference agent has not answered yet."""
        self.served: ModelRef | None = None
        self.before: ModelRef | None = None
        self.version, self.term = 1, 1
        self.start()

    def start(self) -> None:
        rule = {"eligibility": {"rule": "labelled >= 3", "again-s": 5}}
        self.machine = ClientMachine(task_at(self.code, **rule), self.record, LABELS)
        self.decide(ClientManagerStarted())

    def restart(self) -> None:
        """A manager that is killed, and one that continues from the log; the inference agent goes on."""
        record = self.record
        self.record = ClientRecord(record.state, record.data, record.event, record.reason)
        self.jobs, self.timers, self.is_ready, self.has_slot = {}, set(), False, False
        self.start()

    # --- the agent ----------------------------------------------------------------------------------

    def decide(self, event: Event) -> None:
        events = [event]
        while events:
            for effect in self.machine.handle(events.pop(0), NOW):
                events += self.perform(effect)
        self.check()

    def perform(self, effect: Effect) -> list[Event]:
        if isinstance(effect, ClientJobs):
            self.jobs[type(effect).__name__] = effect  # as the agent does: one of each kind
            return []
        match effect:
            case MoveClient(event=event):
                self.arrows.add((self.log, event))
                self.log = CLIENT.advance(self.log, event)
            case StartTimer(timer=timer) | RetryLater(timer=timer):
                self.timers.add(timer)
            case CancelTimer(timer=timer):
                self.timers.discard(timer)
            case HandOverModel(model=handed):
                assert self.log is not ClientState.LEARNING, "a model is handed over during a run"
                assert handed.version in self.files, "the model is no file yet"
                self.asked.append(effect)
            case SwitchCode(task=task):
                assert self.log is not ClientState.LEARNING, "the code changes during a run"
                self.code = task.code_version
            case ReleaseSlot():
                self.has_slot = False
            case FinishStartup():
                self.is_ready = True
            case ReadDeviceFacts():
                return [DeviceFactsRead({"labelled": 0.0 if self.fails() else 12.0})]
            case TakeSlot():
                if self.fails():
                    return [SlotsBusy(("fashion-1",), 1)]
                self.has_slot = True
                return [SlotTaken()]
            case _:
                assert not isinstance(effect, Fail) or self.log is ClientState.TERMINATED
        return []

    # --- what happens -------------------------------------------------------------------------------

    def fails(self, share: float = 0.2) -> bool:
        return self.random.random() < share

    def step(self) -> None:
        """One event: answers are more frequent than news."""
        if self.log is ClientState.TERMINATED:
            self.restart()
            return
        choices: list[tuple[float, Callable[[], None]]] = [(0.3, self.restart)]
        if self.jobs:
            choices.append((6, self.end_a_job))
        if self.timers:
            choices.append((0.7, self.let_a_timer_fire))
        if self.is_ready:
            choices += [
                (2, self.announce_a_model),
                (1, self.publish_code),
                (2, lambda: self.decide(self.an_invitation())),
                (3, self.report_training),
                (0.7, self.roll_back),
            ]
            if self.asked:
                choices.append((6, self.answer_about_a_model))
        weights = [weight for weight, _ in choices]
        self.random.choices([do for _, do in choices], weights)[0]()

    def end_a_job(self) -> None:
        name = self.random.choice(sorted(self.jobs))
        self.decide(self.result_of(self.jobs.pop(name)))

    def result_of(self, job: ClientJobs) -> Event:
        match job:
            case EnrollClient():
                return EnrollmentAnswered("not in this federation" if self.fails(0.05) else "")
            case ReadServerInfo():
                plan = CodePlan(code_version=self.random.choice((OLD, NEW)))
                none = ServerInfoRead(None, "it has no model")
                return none if self.fails() else server_info(self.version, self.term, plan)
            case ReadOpenRun():
                return OpenRunRead(None if self.fails(0.5) else self.an_invitation())
            case FetchModel(announcement=announcement):
                if self.fails():
                    return ModelNotFetched(announcement.model, "it is not offered")
                self.files.add(announcement.model.version)
                return ModelFetched(announcement.model)
            case PrepareCode(version=version):
                return (
                    CodeNotPrepared(version, "not signed") if self.fails() else CodePrepared(task_at(version))
                )

    def let_a_timer_fire(self) -> None:
        timer = self.random.choice(sorted(self.timers))
        self.timers.remove(timer)
        self.decide(TimerFired(timer))

    def announce_a_model(self) -> None:
        """A new version, a promotion of an old one, or the same announcement again."""
        if not self.fails(0.3):
            self.term += 1
            self.version = self.random.randint(1, 5)
        self.decide(model_announced(self.version, self.term))

    def publish_code(self) -> None:
        stable, candidate = self.random.choice(((OLD, ""), (OLD, NEW), (NEW, "")))
        content = {"task": NAME, "code_version": stable, "candidate": candidate}
        more = {"new_lineage": self.fails(), "attempt": self.random.randint(0, 3)}
        self.decide(CodePublished.model_validate(content | more))

    def an_invitation(self) -> UpdateReady:
        code_version = OLD if self.fails() else self.code
        return make_invitation(f"{NAME}-{self.random.randint(1, 3)}", code_version=code_version)

    def report_training(self) -> None:
        run = self.record.data.run if self.record.data.run and not self.fails() else RUN
        if self.fails(0.4):
            self.decide(
                FailTrain(
                    task=NAME, client=CLIENT_ID, run=run, reason="it broke", trainer_lost=self.fails(0.5)
                )
            )
        else:
            self.decide(FinTrain(task=NAME, client=CLIENT_ID, run=run, new_model=not self.fails()))

    def answer_about_a_model(self) -> None:
        asked = self.asked.pop(0)
        version = asked.model.version
        if not self.fails(0.3):
            if self.served != asked.model:
                self.before, self.served = self.served, asked.model
            answer: Event = infer_ready(version, asked.code_version)
        else:
            if self.fails(0.3):
                self.served, self.before = None, None  # it was restarted, and could not load anything
            serving = self.served.version if self.served else None
            answer = infer_refused(
                version,
                serving=serving,
                still=self.served,
                code_version=asked.code_version,
                not_served=self.fails(0.3),
            )
        self.decide(answer)
        if self.fails():
            self.decide(answer)  # delivered twice

    def roll_back(self) -> None:
        if self.served is None or self.before is None:
            return
        message = model_rolled_back(self.served.version, self.before.version)
        self.served, self.before = self.before, None
        self.decide(message)

    # --- what always holds --------------------------------------------------------------------------

    def check(self) -> None:
        self.machine.validate()
        assert self.log is self.record.state, "a transition is not published"
        assert self.has_slot == (self.log is ClientState.LEARNING), (
            "a slot is held without a run, or a run without"
        )
        assert self.code == self.machine.task.code_version
        if self.log is not ClientState.SERVING or self.served:
            client_situation(self.log, self.record.data)  # raises where the data of the state is missing
        self.check_that_it_goes_on()

    def check_that_it_goes_on(self) -> None:
        """Each step has a job, a timer or an answer that ends it."""
        step = self.machine._step
        match step:
            case Ready() | Ended():
                pass
            case Applying():
                assert self.asked or ClientTimer.APPLY in self.timers, step
            case _ if type(step) in WAITS_FOR_TIMER:
                assert WAITS_FOR_TIMER[type(step)] in self.timers, step
            case _:
                assert self.jobs, step


def client_walk(seed: int) -> ClientWalk:
    walk = ClientWalk(seed)
    for _ in range(300):
        walk.step()
    return walk


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_events_breaks_the_client(seed: int) -> None:
    client_walk(seed)


def test_the_walks_take_every_arrow_of_the_client() -> None:
    taken = {arrow for seed in range(100) for arrow in client_walk(seed).arrows}
    assert {(str(state), str(event)) for state, event in CLIENT.arrows} - taken == set()
