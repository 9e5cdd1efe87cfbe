"""The runs of one task: makes them, one at a time, has them opened, and moves them as the server moves.

The server manager opens a run when it can: while it is busy or away the run stays requested,
and is asked for again. From then on each transition of the server is, by `FOLLOWS`, one of the
run, or none of its business.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeAlias

import structlog
from opentelemetry import trace

from fedbus.agents.common import tracing
from fedbus.agents.common.asyncio_tools import Timers, request_until_answered
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore
from fedbus.contracts.causation import cause_scope
from fedbus.contracts.identifiers import TaskId, run_id
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.run import (
    RUN,
    RunChanges,
    RunData,
    RunEvent,
    RunOverrides,
    RunStarted,
    RunState,
    RunStopped,
    StartRun,
    StopRun,
)
from fedbus.contracts.server import CancelRun, OpenRun, ServerData, ServerEvent, ServerState
from fedbus.contracts.task.task import Task
from fedbus.contracts.telemetry import get_tracer
from fedbus.contracts.transition import Transition
from fedbus.domain.round_history import append_round
from fedbus.domain.triggers import RunMetric

OPEN_RUN_TIMEOUT_S: Final = 45.0
"""How long the server manager may take for one answer; then it is asked again."""
START_RUN_REPLY_S: Final = 10.0
"""How long whoever starts a run waits to hear whether it was opened; a busy manager may open it later."""
SCHEDULED: Final = "schedule"
OPENING: Final = "the run is opened"
CANCELLING: Final = "the run is cancelled"

RUN_EVENT_OF_SERVER_EVENT: Final[Mapping[str, RunEvent]] = {
    ServerEvent.RUN_REQUESTED: RunEvent.RECRUITING_STARTED,
    ServerEvent.QUORUM_REACHED: RunEvent.QUORUM_REACHED,
    ServerEvent.RECRUITING_EXPIRED: RunEvent.RECRUITING_EXPIRED,
    ServerEvent.ROUND_FINISHED: RunEvent.ROUND_FINISHED,
    ServerEvent.SERVER_LOST: RunEvent.SERVER_LOST,
    ServerEvent.SERVER_RECOVERED: RunEvent.SERVER_RECOVERED,
    ServerEvent.RUN_FAILED: RunEvent.RUN_FAILED,
    ServerEvent.RUN_CANCELLED: RunEvent.CANCELLED,
    ServerEvent.VERSION_PUBLISHED: RunEvent.RUN_FINISHED,
    ServerEvent.CANDIDATE_KEPT: RunEvent.RUN_FINISHED,
    ServerEvent.VERSION_REFUSED: RunEvent.RUN_FAILED,
}
"""What an event of the server is to its run."""
BLOCKING_STATES: Final = frozenset({ServerEvent.STORE_UNAVAILABLE, ServerEvent.MODEL_NOT_BUILT})
NO_MODEL: Final = "it has no model yet, see `fedbus events tail`"
STORE_TROUBLE: Final = "its model repository is {}, see `fedbus events tail`"

RunHandle: TypeAlias = LifecycleHandle[RunState, RunEvent, RunData, RunChanges]

log = structlog.get_logger("fedbus.workflow_scheduler")
tracer = get_tracer("fedbus.workflow_scheduler")


class ScheduledRuns:
    """For as long as the scheduler leads. *on_change* is called, in turn, when a run has ended or a model is there."""

    def __init__(
        self,
        bus: Bus,
        task: Task,
        overrides: RunOverrides,
        *,
        lives: LifecycleStore,
        timers: Timers,
        on_change: Callable[[], Awaitable[None]],
    ) -> None:
        self._bus = bus
        self.task = task
        """As everybody has it."""
        self._overrides = overrides
        self._lives = lives
        self._timers = timers
        self._on_change = on_change
        self._turn = asyncio.Lock()
        self._run: RunHandle | None = None
        self._opened: asyncio.Future[Refused | None] | None = None
        self._numbered = 0
        self._ends: list[tuple[RunData, datetime]] = []
        """The last two runs that finished, and when."""
        self.scheduled = 0
        """How many runs the log knows that a schedule has started."""
        self.last_ended: datetime | None = None
        self.hindrance = NO_MODEL
        """Why no run can be started, in words; empty where one can."""

    async def remember(self) -> None:
        """What the log tells of this task's runs: how many, and whether one is under way."""
        server = await self._bus.states("server", self.task.id)
        for transition in server:
            self.hindrance = _blocked_reason(transition, self.hindrance)
        told = [one for one in await self._bus.last_transitions("run") if one.message.task == self.task.id]
        told = sorted((one for one in told if _run_facts(one) is not None), key=_number_of)
        runs = [facts for one in told if (facts := _run_facts(one)) is not None]
        if not runs:
            return
        self._numbered = _number(runs[-1])
        self.scheduled = sum(facts.trigger == SCHEDULED for facts in runs)
        self.last_ended = max((one.envelope.time for one in told if _is_final(one)), default=None)
        done = [one for one in told if _target_state(one) == RunState.FINISHED]
        self._ends = [
            (facts, one.envelope.time) for one in done[-2:] if (facts := _run_facts(one)) is not None
        ]
        last = await self._lives.of(RUN, runs[-1])
        if last.state not in RUN.final:
            self._run = last
        if last.state is RunState.REQUESTED:  # never opened, because we ended in between
            self._begin_to_open(last)

    # --- what is so --------------------------------------------------------------------------

    @property
    def current(self) -> str | None:
        """The run that is under way."""
        return self._run.facts.run if self._run is not None else None

    @property
    def next_id(self) -> str:
        return run_id(TaskId(self.task.id), self._numbered + 1)

    def has_made(self, run: str) -> bool:
        return int(run.rpartition("-")[2]) <= self._numbered

    @property
    def figures(self) -> dict[str, RunMetric]:
        """What the last two runs that finished ended with."""
        if len(self._ends) < 2:
            return {}
        (before, _), (latest, at) = self._ends
        old, new = _trigger_metrics(before), _trigger_metrics(latest)
        return {name: RunMetric(old[name], new[name], at) for name in new if name in old}

    def in_turn(self, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """*work*, when nothing else is being decided."""

        async def alone() -> None:
            async with self._turn:
                await work()

        return alone

    # --- what is asked -------------------------------------------------------------------------

    @property
    def answers(self) -> dict[Any, Callable[[Any], Awaitable[Body]]]:
        return {StartRun: self._start_run, StopRun: self._stop_run}

    async def _start_run(self, request: StartRun) -> Body:
        async with self._turn:
            if self._run is not None:
                return Refused(
                    reason=f"{self._run.facts.run} is {self._run.state}, and a task has one run at a time: "
                    f"wait for it, or stop it with `fedbus run stop {self._run.facts.run}`"
                )
            if self.hindrance:
                return Refused(reason=f"task {self.task.id} can have no run now: {self.hindrance}")
            with tracer.start_as_current_span(f"run by {request.trigger}"):
                asked = self._overrides.merge(request.overrides)
                run, opened = await self._make(asked, request.trigger, request.trigger)
        done, _ = await asyncio.wait([opened], timeout=START_RUN_REPLY_S)
        refusal = opened.result() if done else None
        return refusal or RunStarted(run=run.facts.run)

    async def _stop_run(self, request: StopRun) -> Body:
        async with self._turn:
            if self._run is None or self._run.facts.run != request.run:
                return Refused(reason=f"{request.run} is not under way: see `fedbus run ls`")
            with tracing.link_and_use_trace(
                self._run.facts.traceparent
            ):  # its end is the end of its own trace
                return await self._stop(self._run, request.reason)

    async def _stop(self, run: RunHandle, reason: str) -> Body:
        name = run.facts.run
        if run.state is RunState.REQUESTED:
            await self._stop_before_it_is_opened(run, reason)
            return RunStopped(run=name)
        try:
            await self._cancel(name, reason)
        except (RequestRefused, NoResponse) as error:
            return Refused(reason=str(error))
        return RunStopped(run=name)

    async def _stop_before_it_is_opened(self, run: RunHandle, reason: str) -> None:
        """Nobody has opened it yet; should the server manager do so all the same, `follow` cancels it there."""
        self._timers.cancel(OPENING)
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(Refused(reason=f"{run.facts.run} was stopped: {reason}"))
        await run.transition(RunEvent.CANCELLED, reason=reason)
        await self._ended(run)

    async def _cancel(self, run: str, reason: str) -> None:
        await self._bus.request(
            CancelRun(task=self.task.id, run=run, reason=reason), timeout_s=OPEN_RUN_TIMEOUT_S
        )

    def cancel(self, reason: str) -> None:
        """Have the run that is under way cancelled, beside whatever else is done."""
        if self._run is not None:
            with tracing.use_trace(self._run.facts.traceparent):  # its end is the end of its own trace
                self._timers.after(CANCELLING, 0.0, partial(self._cancel_anyhow, self._run.facts.run, reason))

    async def _cancel_anyhow(self, run: str, reason: str) -> None:
        try:
            await self._cancel(run, reason)
        except (RequestRefused, NoResponse) as error:
            log.warning("the run was not cancelled", run=run, reason=str(error))

    # --- making runs -----------------------------------------------------------------------------

    async def make(self, *, cause: str) -> None:
        """The next run, started by the schedule, in the current trace."""
        await self._make(self._overrides, SCHEDULED, cause)

    async def _make(
        self, overrides: RunOverrides, trigger: str, cause: str
    ) -> tuple[RunHandle, "asyncio.Future[Refused | None]"]:
        """The next run of the task, told of, in the current trace, which is its own; and whether it was opened."""
        span = trace.get_current_span()
        facts = RunData(
            task=self.task.id,
            run=self.next_id,
            plan=overrides.over(self.task.table.plan),
            overrides=overrides,
            trigger=trigger,
            requested_at=datetime.now(UTC),
            trace_id=f"{span.get_span_context().trace_id:032x}",
            traceparent=tracing.current_traceparent(),
        )
        self._numbered += 1
        span.set_attribute("fedbus.run", facts.run)
        run = await self._lives.of(RUN, facts)
        await run.create(reason=cause)
        self._run = run
        with cause_scope(run.last_message_id):
            return run, self._begin_to_open(run)

    def _begin_to_open(self, run: RunHandle) -> "asyncio.Future[Refused | None]":
        self._opened = opened = asyncio.get_running_loop().create_future()
        self._timers.after(OPENING, 0.0, partial(self._open, run, opened))
        return opened

    async def _open(self, run: RunHandle, opened: "asyncio.Future[Refused | None]") -> None:
        """Have the server manager open it, in the run's own trace, however long that is busy or away."""
        facts = run.facts
        request = OpenRun(task=self.task.id, run=facts.run, plan=facts.plan, overrides=facts.overrides)
        answer: Refused | None = None
        with tracing.use_trace(facts.traceparent):
            try:
                await request_until_answered(self._bus, request, timeout_s=OPEN_RUN_TIMEOUT_S)
            except RequestRefused as error:
                await self._refused(run, str(error))
                answer = Refused(reason=str(error))
        if not opened.done():
            opened.set_result(answer)

    async def _refused(self, run: RunHandle, reason: str) -> None:
        async with self._turn:
            log.warning("the run was refused", run=run.facts.run, reason=reason)
            if run.allows(RunEvent.RUN_REFUSED):
                await run.transition(RunEvent.RUN_REFUSED, reason=reason)
                await self._ended(run)

    # --- following the server ------------------------------------------------------------------------

    async def follow(self, transition: Transition) -> None:
        """The run moves as the server did. What is not of this run, or is told twice, changes nothing."""
        async with self._turn:
            server, run = transition.facts, self._run
            assert isinstance(server, ServerData)
            hindered, self.hindrance = self.hindrance, _blocked_reason(transition, self.hindrance)
            if hindered and not self.hindrance:
                await self._on_change()
            if run is None or server.run != run.facts.run:
                self._disown(transition, server)
                return
            event = RUN_EVENT_OF_SERVER_EVENT.get(transition.event)
            if event is None or not run.allows(event):
                return
            await run.transition(
                event, _outcome_facts(transition, server, run.facts), reason=transition.reason
            )
            if run.state in RUN.final:
                await self._ended(run)

    def _disown(self, transition: Transition, server: ServerData) -> None:
        """The server has opened a run that was stopped meanwhile."""
        if transition.event == ServerEvent.RUN_REQUESTED and server.run is not None:
            stop = partial(self._cancel_anyhow, server.run, "it was stopped before it was opened")
            self._timers.after(CANCELLING, 0.0, stop)

    async def _ended(self, run: RunHandle) -> None:
        self._run = None
        self.last_ended = datetime.now(UTC)
        if run.state is RunState.FINISHED:
            self._ends = [*self._ends[-1:], (run.facts, self.last_ended)]
        await self._on_change()


def _blocked_reason(transition: Transition, before: str) -> str:
    """Why no run can be started after the server's *transition*, where *before* is why there was none before it."""
    assert isinstance(transition.facts, ServerData)
    if transition.event in BLOCKING_STATES:
        return transition.reason
    if transition.target == ServerState.MODEL_INIT:
        return NO_MODEL
    if transition.facts.trouble is None:
        return ""
    return before if before not in ("", NO_MODEL) else STORE_TROUBLE.format(transition.facts.trouble)


def _run_facts(seen: StoredMessage) -> RunData | None:
    facts = getattr(seen.message, "facts", None)
    return facts if isinstance(facts, RunData) else None


def _target_state(seen: StoredMessage) -> str:
    return seen.message.target if isinstance(seen.message, Transition) else ""


def _is_final(seen: StoredMessage) -> bool:
    return _target_state(seen) in RUN.final


def _number_of(seen: StoredMessage) -> int:
    facts = _run_facts(seen)
    return _number(facts) if facts is not None else 0


def _number(facts: RunData) -> int:
    return int(facts.run.rpartition("-")[2])


def _trigger_metrics(facts: RunData) -> dict[str, float]:
    """What the run ended with, by the names that triggers know it by."""
    if not facts.rounds:
        return {}
    last = facts.rounds[-1]
    common = {"loss": last.loss, "accuracy": last.accuracy}
    return last.metrics | {name: value for name, value in common.items() if value is not None}


def _outcome_facts(transition: Transition, server: ServerData, run: RunData) -> RunChanges:
    """What the run's facts become by the server's transition."""
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
