"""The lifecycles that the workflow scheduler owns, as its decisions see them: state and data, without the bus.

A record moves when a decision is taken; the agent publishes the same transition when it performs the effect.
"""

from datetime import datetime

from fedbus.agents.common.machine import LifecycleRecord
from fedbus.agents.workflow_scheduler.effects import Cause, MoveRun, MoveSchedule, Trace
from fedbus.contracts.run import RUN, RunChanges, RunData, RunEvent, RunState
from fedbus.contracts.scheduling import (
    SCHEDULE,
    ScheduleChanges,
    ScheduleData,
    ScheduleEvent,
    ScheduleState,
)


class ScheduleRecord(LifecycleRecord[ScheduleState, ScheduleEvent, ScheduleData]):
    """The schedule of a task."""

    def move(
        self,
        event: ScheduleEvent,
        changes: ScheduleChanges | None = None,
        *,
        reason: str = "",
        deadline: datetime | None = None,
        trace: Trace = Trace.EVENT,
        cause: Cause = Cause.EVENT,
    ) -> MoveSchedule:
        """Follow the arrow of *event*; raises IllegalTransition and IllegalChange."""
        changes = changes or {}
        self._advance(SCHEDULE, event, changes, reason)
        return MoveSchedule(event, changes, reason, deadline, trace=trace, cause=cause)


class RunRecord(LifecycleRecord[RunState, RunEvent, RunData]):
    """The current run."""

    def allows(self, event: RunEvent) -> bool:
        return RUN.allows(self.state, event)

    def move(self, event: RunEvent, changes: RunChanges | None = None, *, reason: str = "") -> MoveRun:
        """Follow the arrow of *event*; raises IllegalTransition and IllegalChange."""
        changes = changes or {}
        self._advance(RUN, event, changes, reason)
        return MoveRun(event, changes, reason)
