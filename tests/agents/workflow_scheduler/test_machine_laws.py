"""Laws of the workflow scheduler's decisions, over random orders of messages, requests, results and restarts."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from support.scheduler_machine import (
    SchedulerDriver,
    checked,
    code_published,
    counted,
    drift,
    live_accuracy,
    scheduled_task,
)
from support.server_machine import NEW, OLD, model

from fedbus.agents.common.machine import CancelTimer, Reply, RequestId, RetryLater, StartTimer
from fedbus.agents.workflow_scheduler.effects import (
    CancelOpening,
    CancelServerRun,
    CreateRun,
    Effect,
    FollowOtherTasks,
    LoadCodeAtStartup,
    LoadDeployedCode,
    LoadRun,
    MoveSchedule,
    RequestCancellation,
    RequestOpening,
)
from fedbus.agents.workflow_scheduler.events import (
    CancellationAnswered,
    CodeResult,
    DeployedCodeLoaded,
    DeployedCodeRejected,
    DeployedCodeUnavailable,
    Event,
    OpeningAnswered,
    RunStartRequested,
    RunStopRequested,
    SchedulerTimer,
    ServiceStarted,
    TriggerMessageReceived,
)
from fedbus.contracts.message import Message
from fedbus.contracts.run import RUN, RoundResult, RunState, StartRun, StopRun
from fedbus.contracts.scheduling import SCHEDULE, ScheduleEvent, ScheduleState
from fedbus.contracts.server import SERVER, CancelRun, OpenRun, ServerEvent, ServerState, StoreProblem
from fedbus.contracts.transition import Transition

SchedulerJobs = RequestOpening | CancelServerRun | LoadDeployedCode | FollowOtherTasks

SCHEDULES: tuple[dict[str, Any], ...] = (
    {"when": "drift or every 20s or new_code", "overlap": "queue"},
    {"when": "labelled >= 5 or live_accuracy < 0.8", "overlap": "skip", "again_s": 30},
    {"when": "drift on 2 clients or after other", "overlap": "cancel-running"},
    {"when": "cron '* * * * *' or drift", "missed": "all", "debounce_s": 5},
    {"when": "accuracy drops 0.1 or drift", "quiet": "hour in 12..13", "overlap": "skip"},
    {"every_s": 10, "at_most": 5},
    {},
)
SERVER_EVENTS = (
    ServerEvent.QUORUM_REACHED,
    ServerEvent.RECRUITING_EXPIRED,
    ServerEvent.ROUND_FINISHED,
    ServerEvent.SERVER_LOST,
    ServerEvent.SERVER_RECOVERED,
    ServerEvent.RUN_FAILED,
    ServerEvent.RUN_FINISHED,
    ServerEvent.VERSION_PUBLISHED,
    ServerEvent.CANDIDATE_KEPT,
    ServerEvent.STORE_UNAVAILABLE,
    ServerEvent.STORE_RECOVERED,
)


class SchedulerWalk:
    """An agent that performs effects in no time, a server manager, devices, users, and schedulers that end anywhere."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        old, new = self.random.choices(SCHEDULES, k=2)
        self.tasks = {OLD: scheduled_task(code=OLD, **old), NEW: scheduled_task(code=NEW, **new)}
        self.driver = SchedulerDriver(self.tasks[OLD])
        self.undelivered: list[Transition] = []
        self.jobs: dict[str, SchedulerJobs] = {}
        self.timers: set[SchedulerTimer] = set()
        self.unanswered: set[RequestId] = set()
        self.starts = 0
        self.driver.server.move(ServerEvent.MODEL_READY, model=model(1))
        self.start()

    # --- the agent ----------------------------------------------------------------------------------

    def start(self) -> None:
        """A scheduler takes over, with what the one before has written."""
        self.jobs, self.timers, self.unanswered = {}, set(), set()
        self.starts += 1
        self.perform(self.driver.start(f"scheduler-{self.starts}"))
        self.decide(ServiceStarted())

    def decide(self, event: Event) -> bool:
        """Handle *event*; False if the scheduler ends before all effects are performed."""
        if self.fails(0.02):
            self.driver.handle_partly(event, self.random.randint(0, 4))
            self.start()
            return False
        schedule = self.driver.schedule
        before = None if schedule is None else (schedule.event, schedule.reason)
        effects = self.driver.handle(event)
        self.check_schedule(before, effects)
        self.perform(effects)
        self.check()
        return True

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SchedulerJobs):
                self.jobs[type(effect).__name__] = effect  # as the agent does: one of each kind
                continue
            match effect:
                case StartTimer(timer=timer) | RetryLater(timer=timer):
                    self.timers.add(timer)
                case CancelTimer(timer=timer):
                    self.timers.discard(timer)
                case CancelOpening():
                    self.jobs.pop(RequestOpening.__name__, None)
                case Reply(id=id):
                    self.unanswered.remove(id)
                case RequestCancellation(id=id, request=request):
                    self.decide(CancellationAnswered(id, request.run, self.cancel_run(request)))
                case LoadCodeAtStartup(version=version):
                    self.perform(self.driver.handle(self.load_code(version)))
                case LoadRun(data=data):
                    assert data == self.driver.run
                case _:
                    pass

    # --- what happens -------------------------------------------------------------------------------

    def fails(self, share: float = 0.2) -> bool:
        return self.random.random() < share

    def step(self) -> None:
        self.driver.wait(self.random.choice((0, 1, 5, 30)))
        choices: list[tuple[float, Callable[[], None]]] = [
            (0.1, self.start),
            (2, self.move_server),
            (2, self.receive),
            (1.5, self.request_run),
            (0.7, self.request_stop),
            (0.3, lambda: self.perform(self.driver.finish_other_run())),
        ]
        if self.undelivered:
            choices.append((6, self.deliver_next))
        if set(self.jobs) - {FollowOtherTasks.__name__}:
            choices.append((4, self.end_a_job))
        if self.timers:
            choices.append((1, self.let_a_timer_fire))
        weights = [weight for weight, _ in choices]
        self.random.choices([do for _, do in choices], weights)[0]()

    def receive(self) -> None:
        client = self.random.choice(("c1", "c2"))
        messages: tuple[Message, ...] = (
            drift(client),
            checked(client, drifting=self.fails(0.5)),
            counted(client, self.random.randint(0, 50)),
            live_accuracy(client, self.random.randint(60, 100)),
            code_published(self.random.choice((OLD, NEW))),
        )
        message = self.random.choice(messages)
        self.driver.store(message)
        self.decide(TriggerMessageReceived(message, self.driver.now))

    def request_run(self) -> None:
        request_id = self.driver.next_id()
        self.unanswered.add(request_id)
        self.decide(RunStartRequested(request_id, StartRun(task="tiny")))

    def request_stop(self) -> None:
        request_id = self.driver.next_id()
        self.unanswered.add(request_id)
        run = self.driver.run.run if self.driver.runs and not self.fails() else "tiny-0"
        self.decide(RunStopRequested(request_id, StopRun(task="tiny", run=run)))

    def let_a_timer_fire(self) -> None:
        timer = self.random.choice(sorted(self.timers))
        self.timers.remove(timer)
        self.perform(self.driver.fire(timer))
        self.check()

    def end_a_job(self) -> None:
        name = self.random.choice(sorted(set(self.jobs) - {FollowOtherTasks.__name__}))
        match self.jobs[name]:
            case RequestOpening(request=request):
                self.answer_opening(request)
            case CancelServerRun(request=request):
                del self.jobs[name]
                self.cancel_run(request)
            case LoadDeployedCode(version=version):
                del self.jobs[name]
                self.decide(self.load_code(version))
            case _:
                pass

    def load_code(self, version: str) -> CodeResult:
        if self.fails(0.3):
            return DeployedCodeUnavailable(version, "no route to host")
        if self.fails(0.05):
            return DeployedCodeRejected(version, "not signed")
        return DeployedCodeLoaded(self.tasks[version])

    # --- the server manager -------------------------------------------------------------------------

    def answer_opening(self, request: OpenRun) -> None:
        server = self.driver.server
        if self.fails(0.1):
            del self.jobs[RequestOpening.__name__]
            self.decide(OpeningAnswered(request.run, "no such app"))
        elif server.data.run == request.run and server.state is not ServerState.WAITING:
            del self.jobs[RequestOpening.__name__]
            self.decide(OpeningAnswered(request.run))
        elif server.state is ServerState.WAITING:
            moved = server.move(ServerEvent.RUN_REQUESTED, run=request.run, plan=request.plan)
            self.undelivered.append(moved)
            if not self.fails():  # else the reply is lost, and the agent asks again
                del self.jobs[RequestOpening.__name__]
                self.decide(OpeningAnswered(request.run))

    def cancel_run(self, request: CancelRun) -> str:
        server = self.driver.server
        if server.data.run != request.run or not SERVER.allows(server.state, ServerEvent.RUN_CANCELLED):
            return f"the server is {server.state}"
        self.undelivered.append(server.move(ServerEvent.RUN_CANCELLED, reason=request.reason))
        return ""

    def move_server(self) -> None:
        state = self.driver.server.state
        events = [event for event in SERVER_EVENTS if SERVER.allows(state, event)]
        if not events:
            return
        event = self.random.choice(events)
        changes: dict[str, Any] = {}
        match event:
            case ServerEvent.ROUND_FINISHED:
                number = self.random.randint(1, 3)
                last = RoundResult(round=number, metrics={"accuracy": self.random.random()})
                changes = {"round": number, "last": last}
            case ServerEvent.STORE_UNAVAILABLE:
                changes = {"trouble": StoreProblem.UNAVAILABLE}
            case ServerEvent.STORE_RECOVERED:
                changes = {"trouble": None}
            case ServerEvent.VERSION_PUBLISHED:
                changes = {"model": model(2)}
            case ServerEvent.CANDIDATE_KEPT:
                changes = {"candidate": model(2)}
            case _:
                pass
        self.undelivered.append(self.driver.server.move(event, reason="the server moved", **changes))

    def deliver_next(self) -> None:
        """In order, each until it is acknowledged; an acknowledgement may be lost."""
        if self.decide(self.undelivered[0]) and not self.fails(0.1):
            self.undelivered.pop(0)

    # --- what always holds --------------------------------------------------------------------------

    def check(self) -> None:
        driver, machine = self.driver, self.driver.machine
        current = machine._runs._record
        if current is None:
            assert driver.run_state in ("", *RUN.final), "a run is forgotten"
        else:
            assert (current.state, current.data) == (driver.run_state, driver.run)
        assert [run.data.run for run in driver.runs] == [
            f"tiny-{number}" for number in range(1, len(driver.runs) + 1)
        ]
        if driver.run_state == RunState.REQUESTED:
            is_opened = any(one.event == ServerEvent.RUN_REQUESTED for one in self.undelivered)
            assert is_opened or RequestOpening.__name__ in self.jobs, "a requested run is not opened"
        if self.unanswered:
            assert SchedulerTimer.REPLY in self.timers, "a request gets no reply"
        assert len(self.unanswered) <= 1
        self.check_that_a_due_run_starts()

    def check_that_a_due_run_starts(self) -> None:
        """Unless the task has no schedule any more, or one that allows no further run."""
        schedule = self.driver.machine._schedule
        assert schedule is not None
        if self.driver.state is not ScheduleState.DUE or schedule._trigger is None:
            return
        is_blocked = self.driver.machine._runs.blocked_reason != ""
        is_running = self.driver.run_state not in ("", *RUN.final)
        may_wait = is_blocked or is_running or schedule._is_exhausted(self.driver.data)
        assert may_wait or SchedulerTimer.EVALUATE in self.timers, "a due run never starts"

    def check_schedule(self, before: tuple[ScheduleEvent, str] | None, effects: list[Effect]) -> None:
        """A plan and a postponement are published once, and no run starts while none may."""
        for effect in effects:
            match effect:
                case MoveSchedule(event=ScheduleEvent.POSTPONED, reason=reason):
                    assert before != (ScheduleEvent.POSTPONED, reason)
                case MoveSchedule(event=event, reason=reason):
                    before = (event, reason)
                case CreateRun():
                    assert self.driver.machine._runs.blocked_reason == ""
                case _:
                    pass


def scheduler_walk(seed: int) -> SchedulerWalk:
    walk = SchedulerWalk(seed)
    for _ in range(300):
        walk.step()
    return walk


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_events_breaks_the_scheduler(seed: int) -> None:
    scheduler_walk(seed)


def test_the_walks_take_every_arrow_of_runs_and_schedules() -> None:
    taken = {arrow for seed in range(60) for arrow in scheduler_walk(seed).driver.arrows}
    arrows = {(cycle.kind, *arrow[:2]) for cycle in (RUN, SCHEDULE) for arrow in cycle}
    assert {(kind, str(state), str(event)) for kind, state, event in arrows} - taken == set()
