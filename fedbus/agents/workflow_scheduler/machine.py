"""The decisions of the workflow scheduler: events in, effects out. No bus, no code repository, no clock, no task.

`SchedulerMachine.handle` takes one event and returns what the agent must do. Four parts decide:
`TaskRuns` (creates runs and moves them as the server moves), `RunSchedule` (when the next run is due and what
postpones it), `TriggerInputTracker` (the values that triggers read) and `_DeployedCode` (which code new runs use).
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from pydantic import ValidationError

from fedbus.agents.common.machine import CancelTimer, Log, RetryLater, TimerFired
from fedbus.agents.workflow_scheduler.effects import (
    Effect,
    FollowOtherTasks,
    LoadCodeAtStartup,
    LoadDeployedCode,
)
from fedbus.agents.workflow_scheduler.events import (
    CancellationAnswered,
    CodeResult,
    DeployedCodeLoaded,
    DeployedCodeRejected,
    DeployedCodeUnavailable,
    Event,
    OpeningAnswered,
    OtherRunMoved,
    RunStartRequested,
    RunStopRequested,
    SchedulerStarted,
    SchedulerTimer,
    ServiceStarted,
    TriggerMessageReceived,
)
from fedbus.agents.workflow_scheduler.records import ScheduleRecord
from fedbus.agents.workflow_scheduler.runs import TaskRuns
from fedbus.agents.workflow_scheduler.schedule import RunSchedule
from fedbus.agents.workflow_scheduler.trigger_inputs import TriggerInputTracker
from fedbus.contracts.run import RunOverrides
from fedbus.contracts.scheduling import ScheduleOverrides, ScheduleTable
from fedbus.contracts.task.task import Task
from fedbus.contracts.transition import Transition
from fedbus.domain.run_participation import short_version


@dataclass(frozen=True)
class SchedulerConfig:
    """The task as it was read at the start, and what replaces values of it."""

    task: Task
    overrides: RunOverrides
    schedule: ScheduleOverrides


class _DeployedCode:
    """Loads the code that all clients run, whenever it differs from the code that new runs use."""

    def __init__(self, inputs: TriggerInputTracker) -> None:
        self._inputs = inputs
        self._loading = ""
        """The version that is loaded, or waits for the next attempt."""
        self._rejected = ""
        self._failures = 0
        """Failed attempts to load it, in a row."""

    def load(self) -> list[Effect]:
        """Start to load the deployed version, unless runs use it already or it cannot be used."""
        version = self._inputs.code_version
        if version == self._loading:
            return []
        effects: list[Effect] = [CancelTimer(SchedulerTimer.CODE)] if self._loading else []
        self._loading, self._failures = "", 0
        if version in ("", self._inputs.task.code_version, self._rejected):
            return effects
        self._loading = version
        return [*effects, LoadDeployedCode(version)]

    def load_again(self) -> list[Effect]:
        return [LoadDeployedCode(self._loading)] if self._loading else []

    def accept(self, version: str) -> bool:
        """End the loading of *version*; False if another version is deployed by now."""
        if version != self._loading:
            return False
        self._loading = ""
        return True

    def on_rejected(self, version: str, reason: str) -> list[Effect]:
        self._rejected = version
        if not self.accept(version):
            return []
        text = "Code version rejected; keeping the current run configuration"
        return [Log("warning", text, {"code": version, "reason": reason})]

    def on_unavailable(self, version: str, reason: str) -> list[Effect]:
        if version != self._loading:
            return []
        retry = RetryLater(SchedulerTimer.CODE, self._failures)
        self._failures += 1
        if self._failures > 1:
            return [retry]
        text = "Code repository unavailable; keeping the current run configuration"
        return [Log("warning", text, {"code": version, "reason": reason}), retry]


class SchedulerMachine:
    """The scheduler of one task, for as long as it leads.

    Args:
        schedule: The schedule lifecycle, as the log has it; None if there is none yet.
        holder: The name of this scheduler in the lease.

    """

    def __init__(self, config: SchedulerConfig, schedule: ScheduleRecord | None, *, holder: str) -> None:
        self._config = config
        self._record = schedule
        self._holder = holder
        self._inputs = TriggerInputTracker(config.task)
        self._code = _DeployedCode(self._inputs)
        self._runs = TaskRuns(config.task, config.overrides)
        self._schedule: RunSchedule | None = None
        """None until the code that it follows is loaded."""
        self._startup: SchedulerStarted | None = None
        """The start that waits for that code."""
        self._follows_other_tasks = False

    def validate(self) -> None:
        """Check that the parts agree; for tests."""
        self._runs.validate()
        if self._schedule is not None:
            self._schedule.validate()

    # --- events -------------------------------------------------------------------------------------

    def handle(self, event: Event, now: datetime) -> list[Effect]:  # noqa: PLR0911 - one line an event
        """Decide on *event*; the agent performs the effects in their order."""
        match event:
            case SchedulerStarted():
                return self._on_start(event, now)
            case ServiceStarted():
                return [*self._evaluate(now), *self._code.load(), *self._follow_other_tasks()]
            case RunStartRequested():
                return self._runs.on_start_requested(event, now)
            case RunStopRequested():
                return self._and_evaluate_if_ended(lambda: self._runs.on_stop_requested(event, now), now)
            case OpeningAnswered():
                return self._and_evaluate_if_ended(lambda: self._runs.on_opening_answered(event, now), now)
            case CancellationAnswered():
                return self._runs.on_cancellation_answered(event)
            case Transition():
                unblocked = self._evaluate(now) if self._runs.unblock_by(event) else []
                moved = self._and_evaluate_if_ended(lambda: self._runs.on_server_transition(event, now), now)
                return unblocked + moved
            case TriggerMessageReceived(message=message, at=at):
                self._inputs.record(message, at)
                return [*self._code.load(), *self._evaluate(now)]
            case OtherRunMoved(transition=transition, at=at):
                return self._evaluate(now) if self._inputs.record_run(transition, at) else []
            case DeployedCodeLoaded() | DeployedCodeRejected() | DeployedCodeUnavailable():
                return self._on_code_result(event, now)
            case TimerFired(timer=timer):
                return self._on_timer(timer, now)
            case _:
                assert_never(event)

    def _on_timer(self, timer: SchedulerTimer, now: datetime) -> list[Effect]:
        match timer:
            case SchedulerTimer.EVALUATE:
                return self._evaluate(now)
            case SchedulerTimer.REPLY:
                return self._runs.on_reply_timeout()
            case SchedulerTimer.CODE:
                return self._code.load_again()
            case _:
                assert_never(timer)

    def _evaluate(self, now: datetime) -> list[Effect]:
        return self._schedule.evaluate(now) if self._schedule is not None else []

    def _and_evaluate_if_ended(self, decide: Callable[[], list[Effect]], now: datetime) -> list[Effect]:
        """Return the effects of *decide*; if they end the current run, the next one may start."""
        before = self._runs.current
        effects = decide()
        has_ended = before is not None and self._runs.current is None
        return effects + self._evaluate(now) if has_ended else effects

    # --- the start ----------------------------------------------------------------------------------

    def _on_start(self, event: SchedulerStarted, now: datetime) -> list[Effect]:
        """Continue from the log, by the deployed code if it can be loaded at once."""
        self._startup = event
        for one in event.messages:
            self._inputs.record(one.message, one.at)
        if self._inputs.code_version in ("", self._config.task.code_version):
            return self._take_over(event, self._config.task, now)
        return [LoadCodeAtStartup(self._inputs.code_version)]

    def _take_over(self, event: SchedulerStarted, task: Task, now: datetime) -> list[Effect]:
        self._startup = None
        self._runs.task = self._inputs.task = task
        table, effects = self._schedule_of(task)
        effects += self._runs.restore(event.server, event.runs)
        self._schedule = RunSchedule(
            table, self._record, holder=self._holder, runs=self._runs, inputs=self._inputs
        )
        return effects + self._schedule.take_over(now)

    def _on_startup_code_result(
        self, startup: SchedulerStarted, event: CodeResult, now: datetime
    ) -> list[Effect]:
        """Start with the deployed code; if it cannot be loaded, with the code of the start, and load it later."""
        if isinstance(event, DeployedCodeLoaded):
            return self._take_over(startup, event.task, now)
        if isinstance(event, DeployedCodeRejected):
            self._code.on_rejected(event.version, event.reason)
        text = "Cannot load the deployed code; using the code of the start"
        log = Log("warning", text, {"code": event.version, "reason": event.reason})
        return [log, *self._take_over(startup, self._config.task, now)]

    def _schedule_of(self, task: Task) -> tuple[ScheduleTable, list[Effect]]:
        """Return the schedule of *task* with the overrides, or without them if they conflict with it."""
        own = task.table.schedule
        try:
            return self._config.schedule.apply_to(own), []
        except ValidationError as error:
            text = "Ignoring scheduler options that conflict with the task's schedule"
            data = {"code": task.code_version, "reason": error.errors()[0]["msg"]}
            return own, [Log("warning", text, data)]

    # --- the deployed code --------------------------------------------------------------------------

    def _on_code_result(self, event: CodeResult, now: datetime) -> list[Effect]:
        if (startup := self._startup) is not None:
            return self._on_startup_code_result(startup, event, now)
        match event:
            case DeployedCodeLoaded(task=task):
                is_wanted = self._code.accept(task.code_version)
                return (
                    self._change_to(task, self._schedule, now)
                    if is_wanted and self._schedule is not None
                    else []
                )
            case DeployedCodeRejected(version=version, reason=reason):
                return self._code.on_rejected(version, reason)
            case DeployedCodeUnavailable(version=version, reason=reason):
                return self._code.on_unavailable(version, reason)
            case _:
                assert_never(event)

    def _change_to(self, task: Task, schedule: RunSchedule, now: datetime) -> list[Effect]:
        """Use *task* for new runs from now on."""
        self._runs.task = self._inputs.task = task
        table, effects = self._schedule_of(task)
        effects += schedule.change_to(table, f"code {short_version(task.code_version)}", now)
        return [*effects, *self._follow_other_tasks(), *self._evaluate(now)]

    # --- other tasks --------------------------------------------------------------------------------

    def _follow_other_tasks(self) -> list[Effect]:
        """Begin to read the runs of other tasks, once, if the trigger reads them."""
        if self._schedule is None or self._follows_other_tasks or not self._schedule.reads_other_tasks:
            return []
        self._follows_other_tasks = True
        return [FollowOtherTasks()]
