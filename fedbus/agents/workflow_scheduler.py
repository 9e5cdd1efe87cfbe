"""The workflow scheduler: makes runs, one at a time per task, and owns their lifecycle.

A run is asked for by hand (`start_run`) or by the task's schedule. The scheduler has the server
manager open it, and from then on the run follows what the server says of itself: each
transition of the server is, by `FOLLOWS`, one of the run, or none of its business.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from opentelemetry import trace
from opentelemetry.context import Context

from fedbus import __version__
from fedbus.agents import traces
from fedbus.agents.tasks import Timers, ask_until_answered, handle_each, until
from fedbus.bus.bus import Bus, Seen
from fedbus.bus.errors import NoAnswer, RequestRefused
from fedbus.bus.lives import Life, Lives
from fedbus.contracts.identifiers import TaskId, run_id
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.run import (
    RUN,
    RunFacts,
    RunPlan,
    RunStarted,
    RunState,
    RunStopped,
    StartRun,
    StopRun,
)
from fedbus.contracts.server import CancelRun, OpenRun, ServerFacts, ServerState
from fedbus.contracts.task import ScheduleTable, Task
from fedbus.contracts.transition import Transition
from fedbus.domain.history import with_round
from fedbus.domain.scheduling import next_start

REQUEST_S: Final = 45.0
"""How long the server manager may take to open a run."""
SCHEDULED: Final = "schedule"
NEXT_RUN: Final = "next run"

FOLLOWS: Final[Mapping[str, str]] = {
    "run_requested": "recruiting_started",
    "quorum_reached": "quorum_reached",
    "recruiting_expired": "recruiting_expired",
    "round_finished": "round_finished",
    "server_lost": "server_lost",
    "server_recovered": "server_recovered",
    "run_failed": "run_failed",
    "run_cancelled": "cancelled",
    "version_published": "run_finished",
    "candidate_kept": "run_finished",
    "version_refused": "run_failed",
}
"""What an event of the server is to its run."""

log = structlog.get_logger("fedbus.workflow_scheduler")
tracer = trace.get_tracer("fedbus.workflow_scheduler")


class WorkflowScheduler:
    """The scheduler of one task. *plan* and *schedule* take the place of the task's own, where given."""

    def __init__(
        self, bus: Bus, task: Task, *, plan: RunPlan | None = None, schedule: ScheduleTable | None = None
    ) -> None:
        self._bus = bus
        self._task = task
        self._plan = plan or task.table.plan
        self._schedule = schedule or task.table.schedule
        self._turn = asyncio.Lock()
        self._run: Life[RunState, RunFacts] | None = None
        self._numbered = 0
        self._scheduled = 0
        self._last_ended: datetime | None = None
        self._has_model = False
        self._lives: Lives
        self._timers: Timers
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Schedule until *stop* is set; a run under way goes on without us, and we follow it when we are back."""
        await self._bus.make_streams()
        async with (
            Lives.open(self._bus) as self._lives,
            Timers.running() as self._timers,
            self._bus.listen("workflow-scheduler", task=self._task.id) as inbox,
        ):
            await self._remember()
            async with self._bus.serve(self._answers, task=self._task.id, version=__version__):
                await until(stop, self._live(inbox))

    async def _live(self, inbox: AsyncIterator[Any]) -> None:
        self.ready.set()
        self._plan_next()
        await handle_each(inbox, self._follow)

    async def _remember(self) -> None:
        """What the log tells of this task's runs: how many, and whether one is under way."""
        server = await self._bus.states("server", self._task.id)
        self._has_model = any(one.target != ServerState.MODEL_INIT for one in server)
        told = [one for one in await self._bus.last_moves("run") if one.message.task == self._task.id]
        runs = sorted((facts for one in told if (facts := _facts_in(one)) is not None), key=_number)
        if not runs:
            return
        self._numbered = _number(runs[-1])
        self._scheduled = sum(facts.trigger == SCHEDULED for facts in runs)
        self._last_ended = max((one.envelope.time for one in told if _is_final(one)), default=None)
        last = await self._lives.of(RUN, runs[-1])
        if last.state not in RUN.final:
            self._run = last
            await self._catch_up(last)

    async def _catch_up(self, run: Life[RunState, RunFacts]) -> None:
        """A run that was asked for and never opened, because we ended in between, is opened now."""
        if run.state is RunState.REQUESTED:
            await self._open(run)

    # --- what is asked ---------------------------------------------------------------------

    @property
    def _answers(self) -> dict[Any, Callable[[Any], Awaitable[Body]]]:
        return {StartRun: self._start_run, StopRun: self._stop_run}

    async def _start_run(self, request: StartRun) -> Body:
        async with self._turn:
            if self._run is not None:
                return Refused(
                    reason=f"{self._run.facts.run} is {self._run.state}, and a task has one run at a time: "
                    f"wait for it, or stop it with `fedbus run stop {self._run.facts.run}`"
                )
            if not self._has_model:
                return Refused(reason=f"task {self._task.id} has no model yet: see `fedbus events tail`")
            with tracer.start_as_current_span(f"run by {request.trigger}"):
                run = await self._new_run(self._asked_for(request), request.trigger)
            opened = await self._open(run)
            return opened or RunStarted(run=run.facts.run)

    def _asked_for(self, request: StartRun) -> RunPlan:
        asked = {"rounds": request.rounds, "quorum": request.quorum}
        changes = {name: value for name, value in asked.items() if value is not None}
        return self._plan.model_copy(update={**changes, "config": {**self._plan.config, **request.config}})

    async def _stop_run(self, request: StopRun) -> Body:
        async with self._turn:
            if self._run is None or self._run.facts.run != request.run:
                return Refused(reason=f"{request.run} is not under way: see `fedbus run ls`")
            try:
                await self._bus.request(
                    CancelRun(task=self._task.id, run=request.run, reason=request.reason), timeout_s=REQUEST_S
                )
            except (RequestRefused, NoAnswer) as error:
                return Refused(reason=str(error))
        return RunStopped(run=request.run)

    # --- making runs ---------------------------------------------------------------------------

    async def _new_run(self, plan: RunPlan, trigger: str) -> Life[RunState, RunFacts]:
        """The next run of the task, told of, in the current trace, which is its own."""
        self._numbered += 1
        span = trace.get_current_span()
        facts = RunFacts(
            task=self._task.id,
            run=run_id(TaskId(self._task.id), self._numbered),
            plan=plan,
            trigger=trigger,
            requested_at=datetime.now(UTC),
            trace_id=f"{span.get_span_context().trace_id:032x}",
            traceparent=traces.here(),
        )
        span.set_attribute("fedbus.run", facts.run)
        run = await self._lives.of(RUN, facts)
        await run.bear("requested", reason=trigger)
        self._run = run
        return run

    async def _open(self, run: Life[RunState, RunFacts]) -> Refused | None:
        """Have the server manager open it, in the run's own trace; the refusal, where there is one."""
        request = OpenRun(task=self._task.id, run=run.facts.run, plan=run.facts.plan)
        try:
            with traces.going_on(run.facts.traceparent):
                async with asyncio.timeout(REQUEST_S):
                    await ask_until_answered(self._bus, request, timeout_s=REQUEST_S)
        except (RequestRefused, TimeoutError) as error:
            reason = str(error) or f"the server manager did not open it within {REQUEST_S:g} s"
            if run.allows("run_refused"):
                await run.move("run_refused", reason=reason)
            self._ended()
            return Refused(reason=reason)
        return None

    # --- following the server --------------------------------------------------------------------

    async def _follow(self, transition: Transition) -> None:
        """The run moves as the server did. What is not of this run, or is told twice, changes nothing."""
        async with self._turn:
            server, run = transition.facts, self._run
            assert isinstance(server, ServerFacts)
            if not self._has_model and transition.target != ServerState.MODEL_INIT:
                self._has_model = True
                self._plan_next()
            if run is None or server.run != run.facts.run:
                return
            event = FOLLOWS.get(transition.event)
            if event is None or not run.allows(event):
                return
            await run.move(event, reason=transition.reason, **_what_it_came_to(transition, server, run.facts))
            if run.state in RUN.final:
                self._ended()

    def _ended(self) -> None:
        self._run = None
        self._last_ended = datetime.now(UTC)
        self._plan_next()

    # --- the schedule -------------------------------------------------------------------------------

    def _plan_next(self) -> None:
        """Set the clock for the next scheduled run, if there is to be one and none is under way."""
        if self._run is not None or not self._has_model:
            return
        now = datetime.now(UTC)
        due = next_start(self._schedule, started=self._scheduled, last_ended=self._last_ended, now=now)
        if due is not None:
            self._timers.at(NEXT_RUN, due, self._start_scheduled)

    async def _start_scheduled(self) -> None:
        async with self._turn:
            if self._run is not None:  # somebody was faster: its end sets the clock again
                return
            self._scheduled += 1
            # A trace of its own: we were set off by the end of the run before.
            with tracer.start_as_current_span(f"run by {SCHEDULED}", Context()):
                run = await self._new_run(self._plan, SCHEDULED)
            if (refused := await self._open(run)) is not None:
                log.warning("the scheduled run was refused", run=run.facts.run, reason=refused.reason)


def _facts_in(seen: Seen) -> RunFacts | None:
    facts = getattr(seen.message, "facts", None)
    return facts if isinstance(facts, RunFacts) else None


def _is_final(seen: Seen) -> bool:
    return isinstance(seen.message, Transition) and seen.message.target in RUN.final


def _number(facts: RunFacts) -> int:
    return int(facts.run.rpartition("-")[2])


def _what_it_came_to(transition: Transition, server: ServerFacts, run: RunFacts) -> dict[str, Any]:
    """What the run's facts become by the server's transition."""
    match transition.event:
        case "run_requested":
            return {"code_version": server.code_version}
        case "quorum_reached":
            return {"cohort": server.cohort}
        case "round_finished" if server.last is not None:
            return {"rounds": with_round(run.rounds, server.last), "cohort": server.cohort}
        case "version_published":
            return {"model": server.model}
        case "candidate_kept":
            return {"model": server.candidate, "promoted": False}
        case _:
            return {}
