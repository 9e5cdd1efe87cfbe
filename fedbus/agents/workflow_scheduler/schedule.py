"""The schedule of one task: watches for its trigger, holds back what is due, and starts the run.

    watching –triggered→ due –fired→ watching       due –skipped→ watching
                                                    due –rescheduled→ watching, by new code

That a run is due is told before it is started, and that it is fired before it is made: whoever
takes over goes on from there, and whoever was taken over from is refused at the first of these
words. What it decides by is in the log (`scheduler_news`, the runs); how, in `fedbus.domain.triggers`.
"""

from contextlib import AbstractContextManager
from contextvars import Context as Variables
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

import structlog
from opentelemetry.context import Context

from fedbus.agents.common import tracing
from fedbus.agents.common.asyncio_tools import Timers
from fedbus.agents.workflow_scheduler.runs import SCHEDULED, ScheduledRuns
from fedbus.agents.workflow_scheduler.trigger_inputs import TriggerInputTracker
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore
from fedbus.contracts.causation import cause_scope
from fedbus.contracts.expressions.parser import leaves
from fedbus.contracts.expressions.trigger import TaskFinishedCondition, Trigger, TriggerCondition
from fedbus.contracts.scheduling import (
    SCHEDULE,
    ScheduleChanges,
    ScheduleData,
    ScheduleEvent,
    ScheduleState,
    ScheduleTable,
)
from fedbus.contracts.situations import schedule_due
from fedbus.contracts.telemetry import get_tracer
from fedbus.domain.triggers import (
    TriggerInputs,
    cron_start_after_restart,
    cron_start_after_run,
    evaluate_trigger,
    next_evaluation,
    ready_at,
    unmet_conditions,
)

EVALUATE_TIMER: Final = "look at the schedule"
MAX_EVALUATE_DELAY: Final = timedelta(hours=1)
"""A machine's clock may be set, or stand still while it sleeps: so long at most is trusted to a timer."""

log = structlog.get_logger("fedbus.workflow_scheduler")
tracer = get_tracer("fedbus.workflow_scheduler")


class RunSchedule:
    """For as long as the scheduler leads. Its methods are called in the scheduler's turn."""

    def __init__(
        self,
        task: str,
        table: ScheduleTable,
        *,
        runs: ScheduledRuns,
        news: TriggerInputTracker,
        timers: Timers,
    ) -> None:
        self._task = task
        self._table = table
        self._runs = runs
        self._news = news
        self._timers = timers
        self._trigger = table.trigger
        self._lives: LifecycleStore
        self._holder: str
        self._life: LifecycleHandle[ScheduleState, ScheduleEvent, ScheduleData, ScheduleChanges]
        self._awake = False

    @property
    def reads_other_tasks(self) -> bool:
        sources: list[TriggerCondition] = leaves(self._trigger) if self._trigger is not None else []
        return any(isinstance(source, TaskFinishedCondition) for source in sources)

    async def wake(self, lives: LifecycleStore, holder: str) -> None:
        """Take the schedule over from whoever had it; from here on that one is refused."""
        self._lives, self._holder = lives, holder
        if self._trigger is not None:
            await self._awaken(self._trigger)

    async def _awaken(self, trigger: Trigger) -> None:
        now = datetime.now(UTC)
        first = ScheduleData(
            task=self._task,
            holder=self._holder,
            since=now,
            clock_since=now,
            started=self._runs.scheduled,
            code_version=self._news.code[0] if self._news.code else self._runs.task.code_version,
            rule=self._table.rule,
        )
        self._life = await self._lives.of(SCHEDULE, first)
        self._awake = True
        if not self._life.born:
            await self._life.create()
            return
        clock_since = cron_start_after_restart(self._table, trigger, self._trigger_inputs())
        await self._life.transition(
            ScheduleEvent.TAKEN_OVER,
            {"holder": self._holder, "clock_since": clock_since, "rule": self._table.rule},
            reason=f"{self._holder} schedules",
        )
        await self._make_what_was_fired()

    async def change_to(self, table: ScheduleTable, reason: str) -> None:
        """Go by *table* from now on. What was due by the old one is not; moments of cron before now do not count."""
        if table == self._table:
            return
        self._table, self._trigger = table, table.trigger
        self._timers.cancel(EVALUATE_TIMER)
        if not self._awake and self._trigger is not None:
            await self._awaken(self._trigger)
        if self._awake:
            await self._life.transition(
                ScheduleEvent.RESCHEDULED,
                {
                    "clock_since": datetime.now(UTC),
                    "due_since": None,
                    "cause": "",
                    "rule": table.rule,
                    "next_at": None,
                    "awaits": (),
                },
                reason=reason,
            )

    async def _make_what_was_fired(self) -> None:
        """A run that was fired and not made, because its scheduler ended in between."""
        facts = self._life.facts
        if facts.run is not None and not self._runs.has_made(facts.run):
            with self._its_trace():
                await self._runs.make(cause="fired before the scheduler was restarted")

    async def consider(self) -> None:
        """Do what is to be done now, and set the clock for the next look."""
        if self._trigger is None or not self._awake or self._runs.hindrance:
            return
        while not self._is_used_up and await self._step(self._trigger):
            pass

    @property
    def _is_used_up(self) -> bool:
        most = self._table.at_most
        return most is not None and self._life.facts.started >= most

    async def _step(self, trigger: Trigger) -> bool:
        """One move of the schedule; False where there is nothing more to be done now."""
        if self._life.state is ScheduleState.WATCHING:
            return await self._watch(trigger)
        with self._its_trace():
            return await self._hold_or_fire(trigger)

    async def _watch(self, trigger: Trigger) -> bool:
        seen = self._trigger_inputs()
        if (now_held := evaluate_trigger(trigger, seen)) is None:
            at = next_evaluation(trigger, seen)
            await self._plan_for(next_at=at, awaits=unmet_conditions(trigger, seen))
            self._look_again(at)
            return False
        with _new_run_trace():
            await self._life.transition(
                ScheduleEvent.TRIGGERED,
                {
                    "due_since": now_held.at,
                    "cause": now_held.why,
                    "traceparent": tracing.current_traceparent(),
                },
                reason=now_held.why,
            )
        return True

    async def _plan_for(self, *, next_at: datetime | None, awaits: tuple[str, ...]) -> None:
        """Tell when the next run may start and what it waits for, where that has changed: it is part of no run."""
        facts = self._life.facts
        if (facts.next_at, facts.awaits) != (next_at, awaits):
            with tracing.detached_trace():
                await self._life.transition(ScheduleEvent.PLANNED, {"next_at": next_at, "awaits": awaits})

    def _its_trace(self) -> AbstractContextManager[object]:
        """The trace of the run that is due; a new one where it became due before fedbus noted any."""
        began = self._life.facts.traceparent
        return tracing.use_trace(began) if began else _new_run_trace()

    async def _hold_or_fire(self, trigger: Trigger) -> bool:
        due, now = schedule_due(self._life.facts), datetime.now(UTC)
        ready = ready_at(self._table, due_since=due.due_since, last_news=self._news.last_at)
        if ready is None or ready > now:
            await self._postpone("it is not to be in the quiet hours, or so soon", ready)
            self._look_again(ready)
            return False
        if self._runs.current is None:
            await self._fire(trigger, due.cause)
            return True
        return await self._overlap(trigger, due.cause, self._runs.current)

    async def _overlap(self, trigger: Trigger, cause: str, running: str) -> bool:
        """A run is due while another is under way."""
        match self._table.overlap:
            case "skip":
                await self._life.transition(
                    ScheduleEvent.SKIPPED, self._from_now_on(trigger), reason=f"{running} is under way"
                )
                return True
            case "cancel-running":
                if await self._postpone(f"{running} is to end first"):
                    self._runs.cancel(f"the next run is due: {cause}")
            case "queue":
                await self._postpone(f"{running} is under way")
        return False

    async def _postpone(self, reason: str, until: datetime | None = None) -> bool:
        """Say once why the run that is due does not start yet; whether it was said now."""
        if self._life.event is ScheduleEvent.POSTPONED and self._life.reason == reason:
            return False
        with cause_scope(
            self._life.last_message_id
        ):  # whatever has come meanwhile, it is due to what triggered it
            await self._life.transition(ScheduleEvent.POSTPONED, reason=reason, deadline=until)
        return True

    async def _fire(self, trigger: Trigger, cause: str) -> None:
        fired: ScheduleChanges = {
            **self._from_now_on(trigger),
            "started": self._life.facts.started + 1,
            "run": self._runs.next_id,
            "fired_for": cause,
            "fired_at": datetime.now(UTC),
        }
        with cause_scope(self._life.last_message_id):
            await self._life.transition(ScheduleEvent.FIRED, fired, reason=cause)
        with cause_scope(self._life.last_message_id):
            await self._runs.make(cause=cause)

    def _from_now_on(self, trigger: Trigger) -> ScheduleChanges:
        """Only what comes after this counts for the next run."""
        seen = self._trigger_inputs()
        return {
            "since": seen.now,
            "clock_since": cron_start_after_run(self._table, trigger, seen),
            "due_since": None,
            "cause": "",
            "labelled": self._news.came("labelled"),
            "unlabelled": self._news.came("unlabelled"),
            "databases": self._news.databases,
            "drifted": tuple(sorted(self._news.drifted)),
            "next_at": None,
            "awaits": (),
            "accuracy": {client: one.accuracy for client, one in self._news.judged.items()},
            "code_version": self._news.code[0] if self._news.code else self._life.facts.code_version,
        }

    def _look_again(self, at: datetime | None) -> None:
        self._timers.cancel(EVALUATE_TIMER)
        if at is not None:
            soonest = min(at, datetime.now(UTC) + MAX_EVALUATE_DELAY)
            look = self._runs.in_turn(self.consider)
            Variables().run(
                self._timers.at, EVALUATE_TIMER, soonest, look
            )  # it is the clock's, and no longer of what is handled now

    def _trigger_inputs(self) -> TriggerInputs:
        facts, news, runs = self._life.facts, self._news, self._runs
        code = news.code if news.code and news.code[0] != facts.code_version else None
        return TriggerInputs(
            now=datetime.now(UTC),
            since=facts.since,
            clock_since=facts.clock_since,
            zone=ZoneInfo(self._table.timezone),
            fresh=facts.started == 0 and runs.last_ended is None,
            running=runs.current is not None,
            last_ended=runs.last_ended,
            labelled=news.gained("labelled", facts.labelled, facts.databases),
            unlabelled=news.gained("unlabelled", facts.unlabelled, facts.databases),
            drifted=news.drifted,
            drifted_before=facts.drifted,
            judged=news.judged,
            accuracy_before=facts.accuracy,
            again=timedelta(seconds=self._table.again_s),
            figures=runs.figures,
            new_code_at=code[1] if code else None,
            finished=news.finished,
        )


def _new_run_trace() -> AbstractContextManager[object]:
    """The beginning of a run's trace: its own, whatever is being handled, to which it is linked."""
    return tracer.start_as_current_span(
        f"run by {SCHEDULED}", Context(), links=tracing.links_to(tracing.current_traceparent())
    )
