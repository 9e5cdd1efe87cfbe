"""The schedule of one task: waits for its trigger, postpones a run that is due, and starts it.

    watching –triggered→ due –fired→ watching       due –skipped→ watching
                                                    due –rescheduled→ watching, by new code

The schedule moves to `due` before the run starts, and is `fired` before the run is created. So a scheduler that takes
over continues from there, and the one before it is refused at the first of these transitions. `fedbus.domain.triggers`
evaluates the trigger.
"""

from datetime import datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from fedbus.agents.common.machine import CancelTimer, StartTimer
from fedbus.agents.workflow_scheduler.effects import Cause, CreateSchedule, Effect, Trace
from fedbus.agents.workflow_scheduler.events import SchedulerTimer
from fedbus.agents.workflow_scheduler.records import ScheduleRecord
from fedbus.agents.workflow_scheduler.runs import TaskRuns
from fedbus.agents.workflow_scheduler.trigger_inputs import TriggerInputTracker
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
from fedbus.contracts.situations import schedule_due, schedule_situation
from fedbus.domain.triggers import (
    TriggerInputs,
    cron_start_after_restart,
    cron_start_after_run,
    evaluate_trigger,
    next_evaluation,
    ready_at,
    unmet_conditions,
)

MAX_EVALUATE_DELAY: Final = timedelta(hours=1)
"""The longest timer: the clock of a machine may be set, and a timer does not run while the machine sleeps."""


class RunSchedule:
    """The schedule of one task.

    It is *active* once it has taken over its lifecycle. A task without a trigger leaves the lifecycle alone.

    Args:
        holder: The scheduler that leads.
        record: The lifecycle, as the log has it; None if the task never had a trigger.

    """

    def __init__(
        self,
        table: ScheduleTable,
        record: ScheduleRecord | None,
        *,
        holder: str,
        runs: TaskRuns,
        inputs: TriggerInputTracker,
    ) -> None:
        self._table = table
        self._trigger = table.trigger
        self._record = record
        self._is_active = False
        self._holder = holder
        self._runs = runs
        self._inputs = inputs

    @property
    def reads_other_tasks(self) -> bool:
        conditions: list[TriggerCondition] = leaves(self._trigger) if self._trigger is not None else []
        return any(isinstance(condition, TaskFinishedCondition) for condition in conditions)

    # --- the start, and other code ------------------------------------------------------------------

    def take_over(self, now: datetime) -> list[Effect]:
        """Take over the schedule: from now on, transitions of the scheduler before this one are refused."""
        return [] if self._trigger is None else self._activate(self._trigger, now)

    def _activate(self, trigger: Trigger, now: datetime) -> list[Effect]:
        self._is_active = True
        if (record := self._record) is None:
            data = ScheduleData(
                task=self._runs.task.id,
                holder=self._holder,
                since=now,
                clock_since=now,
                started=self._runs.scheduled,
                code_version=self._inputs.code_version or self._runs.task.code_version,
                rule=self._table.rule,
            )
            self._record = ScheduleRecord(SCHEDULE.initial, data, SCHEDULE.creation)
            return [CreateSchedule(data)]
        clock_since = cron_start_after_restart(self._table, trigger, self._trigger_inputs(record.data, now))
        changes: ScheduleChanges = {
            "holder": self._holder,
            "clock_since": clock_since,
            "rule": self._table.rule,
        }
        reason = f"{self._holder} took over the schedule"
        effects: list[Effect] = [record.move(ScheduleEvent.TAKEN_OVER, changes, reason=reason)]
        run = record.data.run
        if run is not None and not self._runs.has_created(run):  # the scheduler before ended in between
            reason = "fired before the scheduler restarted"
            effects += self._runs.create_scheduled(reason, now, cause=Cause.EVENT)
        return effects

    def change_to(self, table: ScheduleTable, reason: str, now: datetime) -> list[Effect]:
        """Follow *table* from now on. A run that was due is no longer due, and earlier cron times do not count."""
        if table == self._table:
            return []
        self._table, self._trigger = table, table.trigger
        effects: list[Effect] = [CancelTimer(SchedulerTimer.EVALUATE)]
        if not self._is_active and self._trigger is not None:
            effects += self._activate(self._trigger, now)
        if (record := self._active_record) is not None:
            changes: ScheduleChanges = {
                "clock_since": now,
                "due_since": None,
                "cause": "",
                "rule": table.rule,
                "next_at": None,
                "awaits": (),
            }
            effects.append(record.move(ScheduleEvent.RESCHEDULED, changes, reason=reason))
        return effects

    @property
    def _active_record(self) -> ScheduleRecord | None:
        return self._record if self._is_active else None

    # --- evaluation ---------------------------------------------------------------------------------

    def evaluate(self, now: datetime) -> list[Effect]:
        """Do everything that is due now, and start the timer of the next evaluation."""
        record, trigger = self._active_record, self._trigger
        if trigger is None or record is None or self._runs.blocked_reason:
            return []
        effects: list[Effect] = []
        state: ScheduleState | None = None
        while record.state is not state and not self._is_exhausted(record.data):
            state = record.state
            if state is ScheduleState.WATCHING:
                effects += self._watch(trigger, record, now)
            else:
                effects += self._start_or_postpone(trigger, record, now)
        return effects

    def _is_exhausted(self, data: ScheduleData) -> bool:
        return self._table.at_most is not None and data.started >= self._table.at_most

    def _watch(self, trigger: Trigger, record: ScheduleRecord, now: datetime) -> list[Effect]:
        inputs = self._trigger_inputs(record.data, now)
        if (fired := evaluate_trigger(trigger, inputs)) is None:
            at = next_evaluation(trigger, inputs)
            return [_timer(at, now), *self._plan(record, at, unmet_conditions(trigger, inputs))]
        changes: ScheduleChanges = {"due_since": fired.at, "cause": fired.reason}
        return [record.move(ScheduleEvent.TRIGGERED, changes, reason=fired.reason, trace=Trace.NEW_TRACE)]

    def _plan(
        self, record: ScheduleRecord, next_at: datetime | None, awaits: tuple[str, ...]
    ) -> list[Effect]:
        """Publish when the next run may start and what it waits for, if that changed: it belongs to no run."""
        if (record.data.next_at, record.data.awaits) == (next_at, awaits):
            return []
        changes: ScheduleChanges = {"next_at": next_at, "awaits": awaits}
        return [record.move(ScheduleEvent.PLANNED, changes, trace=Trace.NONE)]

    def _start_or_postpone(self, trigger: Trigger, record: ScheduleRecord, now: datetime) -> list[Effect]:
        due = schedule_due(record.data)
        ready = ready_at(self._table, due_since=due.due_since, last_input=self._inputs.last_change)
        if ready is None or ready > now:
            return [_timer(ready, now), *self._postpone(record, "quiet hours or debounce", ready)]
        if self._runs.current is None:
            return self._fire(trigger, record, due.cause, now)
        return self._overlap(trigger, record, self._runs.current, now)

    def _fire(self, trigger: Trigger, record: ScheduleRecord, reason: str, now: datetime) -> list[Effect]:
        changes: ScheduleChanges = {
            **self._new_baseline(trigger, record.data, now),
            "started": record.data.started + 1,
            "run": self._runs.next_id,
            "fired_for": reason,
            "fired_at": now,
        }
        move = record.move(
            ScheduleEvent.FIRED, changes, reason=reason, trace=Trace.DUE_RUN, cause=Cause.SCHEDULE
        )
        return [move, *self._runs.create_scheduled(reason, now, cause=Cause.SCHEDULE)]

    def _overlap(self, trigger: Trigger, record: ScheduleRecord, running: str, now: datetime) -> list[Effect]:
        """Handle a run that is due during another run."""
        match self._table.overlap:
            case "skip":
                baseline = self._new_baseline(trigger, record.data, now)
                reason = f"{running} is in progress"
                return [record.move(ScheduleEvent.SKIPPED, baseline, reason=reason, trace=Trace.DUE_RUN)]
            case "cancel-running":
                postponed = self._postpone(record, f"{running} must end first")
                reason = f"the next run is due: {record.data.cause}"
                return [*postponed, *self._runs.cancel_current(reason)] if postponed else []
            case "queue":
                return self._postpone(record, f"{running} is in progress")

    def _postpone(self, record: ScheduleRecord, reason: str, until: datetime | None = None) -> list[Effect]:
        """Publish why the run that is due does not start yet, unless that is published already.

        The cause is the transition that made the run due, not the message that is handled.
        """
        if record.event is ScheduleEvent.POSTPONED and record.reason == reason:
            return []
        return [
            record.move(
                ScheduleEvent.POSTPONED,
                reason=reason,
                deadline=until,
                trace=Trace.DUE_RUN,
                cause=Cause.SCHEDULE,
            )
        ]

    # --- what counts --------------------------------------------------------------------------------

    def _new_baseline(self, trigger: Trigger, data: ScheduleData, now: datetime) -> ScheduleChanges:
        """Return the values from which changes count for the next run."""
        inputs = self._inputs
        return {
            "since": now,
            "clock_since": cron_start_after_run(self._table, trigger, self._trigger_inputs(data, now)),
            "due_since": None,
            "cause": "",
            "labelled": inputs.total_rows("labelled"),
            "unlabelled": inputs.total_rows("unlabelled"),
            "databases": inputs.databases,
            "drifted": tuple(sorted(inputs.drifted)),
            "next_at": None,
            "awaits": (),
            "accuracy": {client: one.accuracy for client, one in inputs.accuracy.items()},
            "code_version": inputs.code_version or data.code_version,
        }

    def _trigger_inputs(self, data: ScheduleData, now: datetime) -> TriggerInputs:
        inputs, runs = self._inputs, self._runs
        new_code = inputs.code if inputs.code is not None and inputs.code[0] != data.code_version else None
        return TriggerInputs(
            now=now,
            since=data.since,
            clock_since=data.clock_since,
            zone=ZoneInfo(self._table.timezone),
            is_first_run=data.started == 0 and runs.last_ended is None,
            is_running=runs.current is not None,
            last_ended=runs.last_ended,
            labelled=inputs.new_rows("labelled", data.labelled, data.databases),
            unlabelled=inputs.new_rows("unlabelled", data.unlabelled, data.databases),
            drifted=inputs.drifted,
            drifted_before=data.drifted,
            accuracy=inputs.accuracy,
            accuracy_before=data.accuracy,
            repeat_after=timedelta(seconds=self._table.again_s),
            metrics=runs.metrics,
            new_code_at=new_code[1] if new_code is not None else None,
            finished=inputs.finished,
        )

    def validate(self) -> None:
        """Check that the data has what its state needs; for tests."""
        if self._record is not None:
            schedule_situation(self._record.state, self._record.data)


def _timer(at: datetime | None, now: datetime) -> Effect:
    """Return the effect that evaluates the schedule at *at*; None: only an event evaluates it."""
    if at is None:
        return CancelTimer(SchedulerTimer.EVALUATE)
    return StartTimer(SchedulerTimer.EVALUATE, (min(at, now + MAX_EVALUATE_DELAY) - now).total_seconds())
