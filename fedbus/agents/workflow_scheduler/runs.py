"""The runs of one task: at most one is active, and it moves when the task's server moves.

The server manager opens a run when it can. Until then the run stays requested, and the agent repeats the request.
From then on `RUN_EVENTS` names the event of the run for each event of the server.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from fedbus.agents.common.machine import CancelTimer, Log, Reply, RequestId, StartTimer
from fedbus.agents.workflow_scheduler.effects import (
    CancelOpening,
    CancelServerRun,
    Cause,
    CreateRun,
    Effect,
    JoinRunTrace,
    LoadRun,
    RequestCancellation,
    RequestOpening,
    Trace,
)
from fedbus.agents.workflow_scheduler.events import (
    CancellationAnswered,
    OpeningAnswered,
    RunStartRequested,
    RunStopRequested,
    SchedulerTimer,
    TimedMessage,
)
from fedbus.agents.workflow_scheduler.records import RunRecord
from fedbus.contracts.identifiers import TaskId, run_id
from fedbus.contracts.message import Refused
from fedbus.contracts.run import (
    RUN,
    RunChanges,
    RunData,
    RunEvent,
    RunOverrides,
    RunStarted,
    RunState,
    RunStopped,
)
from fedbus.contracts.server import CancelRun, OpenRun, ServerData, ServerEvent, ServerState
from fedbus.contracts.task.task import Task
from fedbus.contracts.transition import Transition
from fedbus.domain.round_history import append_round
from fedbus.domain.run_outcome import RUN_EVENTS
from fedbus.domain.triggers import RunMetric

START_RUN_REPLY_S: Final = 10.0
"""The longest time that start_run waits for the run to be opened; a busy server manager may open it later."""
SCHEDULED: Final = "schedule"
"""The trigger of a run that the schedule starts."""

BLOCKING_EVENTS: Final = frozenset({ServerEvent.STORE_UNAVAILABLE, ServerEvent.MODEL_NOT_BUILT})
NO_MODEL: Final = "it has no model yet, see `fedbus events tail`"
STORE_TROUBLE: Final = "its model repository is {}, see `fedbus events tail`"


@dataclass(frozen=True)
class _StoredRun:
    """A run as its last transition has it."""

    state: RunState
    event: RunEvent
    data: RunData
    at: datetime

    @property
    def number(self) -> int:
        return _number_of(self.data.run)


@dataclass(frozen=True)
class _StartRequest:
    """A start_run that has no reply yet."""

    id: RequestId
    run: str


class TaskRuns:
    """The runs of one task.

    Args:
        task: The task at the deployed code.
        overrides: Replace values of the task's plan.

    """

    def __init__(self, task: Task, overrides: RunOverrides) -> None:
        self.task = task
        self._overrides = overrides
        self._record: RunRecord | None = None
        self._start_request: _StartRequest | None = None
        self._last_number = 0
        self._finished_runs: list[tuple[RunData, datetime]] = []
        """The last two runs that finished, and when."""
        self.scheduled = 0
        """The number of runs in the log that a schedule started."""
        self.last_ended: datetime | None = None
        self.blocked_reason = NO_MODEL
        """Why no run can start; empty if one can."""

    # --- what the schedule reads --------------------------------------------------------------------

    @property
    def current(self) -> str | None:
        """The current run."""
        return self._record.data.run if self._record is not None else None

    @property
    def next_id(self) -> str:
        return run_id(TaskId(self.task.id), self._last_number + 1)

    def has_created(self, run: str) -> bool:
        return _number_of(run) <= self._last_number

    @property
    def metrics(self) -> dict[str, RunMetric]:
        """The metrics that the last two finished runs have in common."""
        if len(self._finished_runs) < 2:
            return {}
        (before, _), (latest, at) = self._finished_runs
        old, new = _last_metrics(before), _last_metrics(latest)
        return {name: RunMetric(old[name], new[name], at) for name in new if name in old}

    # --- the start ----------------------------------------------------------------------------------

    def restore(self, server: Transition | None, transitions: Sequence[TimedMessage]) -> list[Effect]:
        """Continue from the log: count the runs, and follow the current one."""
        if server is not None:
            self.blocked_reason = _blocked_reason(server, self.blocked_reason)
        runs = sorted(_stored_runs(self.task.id, transitions), key=lambda run: run.number)
        if not runs:
            return []
        last = runs[-1]
        self._last_number = last.number
        self.scheduled = sum(run.data.trigger == SCHEDULED for run in runs)
        self.last_ended = max((run.at for run in runs if run.state in RUN.final), default=None)
        finished = [run for run in runs if run.state is RunState.FINISHED]
        self._finished_runs = [(run.data, run.at) for run in finished[-2:]]
        if last.state in RUN.final:
            return []
        self._record = RunRecord(last.state, last.data, last.event)
        effects: list[Effect] = [LoadRun(last.data)]
        if last.state is RunState.REQUESTED:
            effects.append(RequestOpening(_open_request(last.data), trace=Trace.RUN))
        return effects

    # --- requests -----------------------------------------------------------------------------------

    def on_start_requested(self, event: RunStartRequested, now: datetime) -> list[Effect]:
        if self._record is not None:
            run = self._record.data.run
            return _refuse(
                event.id,
                f"{run} is {self._record.state}, and a task has one run at a time: "
                f"wait for it, or stop it with `fedbus run stop {run}`",
            )
        if self.blocked_reason:
            return _refuse(event.id, f"task {self.task.id} cannot start a run now: {self.blocked_reason}")
        request = event.request
        overdue = self._answer_start()
        self._start_request = _StartRequest(event.id, self.next_id)
        overrides = self._overrides.merge(request.overrides)
        created = self._create(overrides, request.trigger, request.trigger, now, trace=Trace.NEW_SPAN)
        return [*overdue, *created, StartTimer(SchedulerTimer.REPLY, START_RUN_REPLY_S)]

    def on_reply_timeout(self) -> list[Effect]:
        """Answer the request before the run is opened; it may be opened later."""
        return self._answer_start()

    def on_stop_requested(self, event: RunStopRequested, now: datetime) -> list[Effect]:
        """Stop a requested run at once; request the server manager to stop one that is open."""
        record, request = self._record, event.request
        if record is None or record.data.run != request.run:
            return _refuse(event.id, f"{request.run} is not in progress: see `fedbus run ls`")
        if record.state is not RunState.REQUESTED:
            cancel = CancelRun(task=self.task.id, run=request.run, reason=request.reason)
            return [JoinRunTrace(), RequestCancellation(event.id, cancel)]
        return [
            JoinRunTrace(),
            CancelOpening(),
            *self._answer_start_of(request.run, f"{request.run} was stopped: {request.reason}"),
            *self._move(record, RunEvent.CANCELLED, {}, request.reason, now),
            Reply(event.id, RunStopped(run=request.run)),
        ]

    def on_cancellation_answered(self, event: CancellationAnswered) -> list[Effect]:
        if event.refusal:
            return _refuse(event.id, event.refusal)
        return [Reply(event.id, RunStopped(run=event.run))]

    # --- creating and opening -----------------------------------------------------------------------

    def create_scheduled(self, reason: str, now: datetime, *, cause: Cause) -> list[Effect]:
        """Create the run that the schedule has started."""
        return self._create(self._overrides, SCHEDULED, reason, now, trace=Trace.DUE_RUN, cause=cause)

    def _create(
        self,
        overrides: RunOverrides,
        trigger: str,
        reason: str,
        now: datetime,
        *,
        trace: Trace,
        cause: Cause = Cause.EVENT,
    ) -> list[Effect]:
        data = RunData(
            task=self.task.id,
            run=self.next_id,
            plan=self.task.plan_run(overrides),
            overrides=overrides,
            trigger=trigger,
            requested_at=now,
        )
        self._last_number += 1
        self._record = RunRecord(RUN.initial, data, RUN.creation)
        opening = RequestOpening(_open_request(data), trace=Trace.RUN, cause=Cause.RUN)
        return [CreateRun(data, reason, trace=trace, cause=cause), opening]

    def on_opening_answered(self, event: OpeningAnswered, now: datetime) -> list[Effect]:
        effects: list[Effect] = []
        record = self._record
        if event.refusal:
            effects.append(Log("warning", "Run refused", {"run": event.run, "reason": event.refusal}))
            if record is not None and record.data.run == event.run and record.allows(RunEvent.RUN_REFUSED):
                effects += self._move(record, RunEvent.RUN_REFUSED, {}, event.refusal, now)
        return [*effects, *self._answer_start_of(event.run, event.refusal)]

    def _answer_start_of(self, run: str, refusal: str) -> list[Effect]:
        """Answer the request that started *run*, if there is one."""
        request = self._start_request
        return self._answer_start(refusal) if request is not None and request.run == run else []

    def _answer_start(self, refusal: str = "") -> list[Effect]:
        request, self._start_request = self._start_request, None
        if request is None:
            return []
        body = Refused(reason=refusal) if refusal else RunStarted(run=request.run)
        return [CancelTimer(SchedulerTimer.REPLY), Reply(request.id, body)]

    # --- the server ---------------------------------------------------------------------------------

    def unblock_by(self, transition: Transition) -> bool:
        """Record why no run can start after the server's *transition*; True if it ends a block."""
        before, self.blocked_reason = self.blocked_reason, _blocked_reason(transition, self.blocked_reason)
        return before != "" and self.blocked_reason == ""

    def on_server_transition(self, transition: Transition, now: datetime) -> list[Effect]:
        """Move the run as the server moved. A transition of another run, or a repeated one, changes nothing."""
        server, record = _server_of(transition), self._record
        if record is None or server.run != record.data.run:
            return self._cancel_stopped(transition, server)
        event = RUN_EVENTS.get(transition.event)
        if event is None or not record.allows(event):
            return []
        changes = _changes_by(transition, server, record.data)
        return self._move(record, event, changes, transition.reason, now)

    def _cancel_stopped(self, transition: Transition, server: ServerData) -> list[Effect]:
        """Cancel a run that was stopped before the server manager opened it."""
        if transition.event != ServerEvent.RUN_REQUESTED or server.run is None:
            return []
        reason = "the run was stopped before it was opened"
        return [CancelServerRun(CancelRun(task=self.task.id, run=server.run, reason=reason))]

    def cancel_current(self, reason: str) -> list[Effect]:
        """Request the server manager to cancel the current run, in the trace of that run."""
        if self.current is None:
            return []
        request = CancelRun(task=self.task.id, run=self.current, reason=reason)
        return [CancelServerRun(request, trace=Trace.RUN)]

    def _move(
        self, record: RunRecord, event: RunEvent, changes: RunChanges, reason: str, now: datetime
    ) -> list[Effect]:
        move = record.move(event, changes, reason=reason)
        if record.state in RUN.final:
            self._record = None
            self.last_ended = now
            if record.state is RunState.FINISHED:
                self._finished_runs = [*self._finished_runs[-1:], (record.data, now)]
        return [move]

    # --- for tests ----------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check that the parts agree; for tests."""
        assert self._record is None or self._record.state not in RUN.final
        assert self._record is None or _number_of(self._record.data.run) == self._last_number
        assert self._start_request is None or self.has_created(self._start_request.run)


def _refuse(id: RequestId, reason: str) -> list[Effect]:
    return [Reply(id, Refused(reason=reason))]


def _open_request(data: RunData) -> OpenRun:
    return OpenRun(task=data.task, run=data.run, plan=data.plan, overrides=data.overrides)


def _stored_runs(task: str, transitions: Sequence[TimedMessage]) -> Iterator[_StoredRun]:
    for one in transitions:
        match one.message:
            case Transition(task=of, event=event, target=target, facts=RunData() as data) if of == task:
                yield _StoredRun(RunState(target), RunEvent(event), data, one.at)


def _number_of(run: str) -> int:
    return int(run.rpartition("-")[2])


def _server_of(transition: Transition) -> ServerData:
    assert isinstance(transition.facts, ServerData)
    return transition.facts


def _blocked_reason(transition: Transition, before: str) -> str:
    """Return why no run can start after the server's *transition*; *before* is the reason before it."""
    server = _server_of(transition)
    if transition.event in BLOCKING_EVENTS:
        return transition.reason
    if transition.target == ServerState.MODEL_INIT:
        return NO_MODEL
    if server.trouble is None:
        return ""
    return before if before not in ("", NO_MODEL) else STORE_TROUBLE.format(server.trouble)


def _last_metrics(data: RunData) -> dict[str, float]:
    """Return the metrics of the last round, by the names that triggers use."""
    if not data.rounds:
        return {}
    last = data.rounds[-1]
    common = {"loss": last.loss, "accuracy": last.accuracy}
    return last.metrics | {name: value for name, value in common.items() if value is not None}


def _changes_by(transition: Transition, server: ServerData, run: RunData) -> RunChanges:
    """Return how the server's transition changes the data of its run."""
    match transition.event:
        case ServerEvent.QUORUM_REACHED:
            return {"cohort": server.cohort}
        case ServerEvent.ROUND_FINISHED if server.last is not None:
            return {"rounds": append_round(run.rounds, server.last), "cohort": server.cohort}
        case ServerEvent.RUN_REQUESTED:
            return {"code_version": server.code_version, "plan": server.plan or run.plan}
        case ServerEvent.VERSION_PUBLISHED:
            return {"model": server.model}
        case ServerEvent.CANDIDATE_KEPT:
            return {"model": server.candidate, "promoted": False}
        case _:
            return {}
