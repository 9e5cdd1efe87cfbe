"""Effects of the workflow scheduler: everything that the agent does for its decisions.

The three kinds of effects are described in `fedbus.agents.common.machine`.

An effect that publishes names its trace and its cause by what they belong to. Their ids exist only when the agent
performs the effect, and no decision depends on them. The agent also adds the trace to the data of a run, and to that
of a schedule whose run is due.
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias

from fedbus.agents.common.machine import CancelTimer, Log, Reply, RequestId, RetryLater, StartTimer
from fedbus.agents.workflow_scheduler.events import SchedulerTimer
from fedbus.contracts.run import RunChanges, RunData, RunEvent
from fedbus.contracts.scheduling import ScheduleChanges, ScheduleData, ScheduleEvent
from fedbus.contracts.server import CancelRun, OpenRun


class Trace(StrEnum):
    """The trace that an effect belongs to."""

    EVENT = "the trace of the event"
    NEW_SPAN = "a new span in the trace of the event"
    NEW_TRACE = "a new trace, which has a link to that of the event"
    DUE_RUN = "the trace of the run that is due"
    RUN = "the trace of the current run"
    NONE = "no trace"


class Cause(StrEnum):
    """The message that an effect is due to: the header ``ce-causationid``."""

    EVENT = "the message of the event"
    SCHEDULE = "the last transition of the schedule"
    RUN = "the last transition of the current run"


@dataclass(frozen=True, kw_only=True)
class TracedEffect:
    trace: Trace = Trace.EVENT
    cause: Cause = Cause.EVENT


# --- actions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CreateSchedule:
    """Publish the first transition of the schedule."""

    data: ScheduleData


@dataclass(frozen=True)
class MoveSchedule(TracedEffect):
    """Publish a transition of the schedule."""

    event: ScheduleEvent
    changes: ScheduleChanges = field(default_factory=ScheduleChanges)
    reason: str = ""
    deadline: datetime | None = None


@dataclass(frozen=True)
class LoadRun:
    """Read the lifecycle of a run that an earlier scheduler created: from now on it is the current one."""

    data: RunData


@dataclass(frozen=True)
class CreateRun(TracedEffect):
    """Publish the first transition of a run: from now on it is the current one."""

    data: RunData
    reason: str


@dataclass(frozen=True)
class MoveRun:
    """Publish a transition of the current run."""

    event: RunEvent
    changes: RunChanges = field(default_factory=RunChanges)
    reason: str = ""


@dataclass(frozen=True)
class JoinRunTrace:
    """Link the request to the trace of the current run, and perform all later effects in that trace."""


@dataclass(frozen=True)
class CancelOpening:
    """Stop a `RequestOpening` that has no answer yet."""


# --- queries ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadCodeAtStartup:
    """Load the task at the deployed version, once. Result: a `CodeResult`."""

    version: str


@dataclass(frozen=True)
class RequestCancellation:
    """Request the server manager to cancel a run that a user stops. Result: `CancellationAnswered`."""

    id: RequestId
    request: CancelRun


# --- jobs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestOpening(TracedEffect):
    """Request the server manager to open a run; repeat the request until it answers. Result: `OpeningAnswered`."""

    request: OpenRun


@dataclass(frozen=True)
class CancelServerRun(TracedEffect):
    """Request the server manager to cancel a run that no user stops. No result: a refusal is only logged."""

    request: CancelRun


@dataclass(frozen=True)
class LoadDeployedCode:
    """Load the task at the deployed version. Result: a `CodeResult`."""

    version: str


@dataclass(frozen=True)
class FollowOtherTasks:
    """Read the transitions of all runs for as long as the scheduler leads. Results: `OtherRunMoved`."""


Action: TypeAlias = (
    CreateSchedule
    | MoveSchedule
    | LoadRun
    | CreateRun
    | MoveRun
    | JoinRunTrace
    | CancelOpening
    | Reply
    | StartTimer[SchedulerTimer]
    | RetryLater[SchedulerTimer]
    | CancelTimer[SchedulerTimer]
    | Log
)
Query: TypeAlias = LoadCodeAtStartup | RequestCancellation
Job: TypeAlias = RequestOpening | CancelServerRun | LoadDeployedCode | FollowOtherTasks
Effect: TypeAlias = Action | Query | Job
