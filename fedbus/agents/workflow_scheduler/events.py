"""Events of the workflow scheduler: everything that its decisions depend on.

A transition of the task's server is an event itself. The others are requests with the id of their reply, messages
with the time at which they were published, results of effects, and timers.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias

from fedbus.agents.common.machine import RequestId, TimerFired
from fedbus.contracts.message import Message
from fedbus.contracts.run import StartRun, StopRun
from fedbus.contracts.task.task import Task
from fedbus.contracts.transition import Transition


class SchedulerTimer(StrEnum):
    EVALUATE = "evaluate the schedule"
    REPLY = "reply to start_run"
    CODE = "load the deployed code again"


@dataclass(frozen=True)
class TimedMessage:
    message: Message
    at: datetime
    """When it was published, by the clock of its sender."""


# --- the start of a leadership ----------------------------------------------------------------------


@dataclass(frozen=True)
class SchedulerStarted:
    """The scheduler has the lease, and the agent has read the log."""

    messages: tuple[TimedMessage, ...] = ()
    """The last message of each sender that triggers read."""
    server: Transition | None = None
    """The last transition of the task's server."""
    runs: tuple[TimedMessage, ...] = ()
    """The last transition of each run in the federation."""


@dataclass(frozen=True)
class ServiceStarted:
    """From now on the agent answers requests."""


# --- requests ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunStartRequested:
    id: RequestId
    request: StartRun


@dataclass(frozen=True)
class RunStopRequested:
    id: RequestId
    request: StopRun


# --- messages that need more than their content -----------------------------------------------------


@dataclass(frozen=True)
class TriggerMessageReceived:
    """A message that triggers read: rows, checks or drift of a device, or deployed code."""

    message: Message
    at: datetime


@dataclass(frozen=True)
class OtherRunMoved:
    """A transition of a run of any task."""

    transition: Message
    at: datetime


# --- results ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpeningAnswered:
    """The server manager has opened the run, or refused it."""

    run: str
    refusal: str = ""


@dataclass(frozen=True)
class CancellationAnswered:
    """The server manager has cancelled the run that *id* asks to stop, or refused to."""

    id: RequestId
    run: str
    refusal: str = ""


@dataclass(frozen=True)
class DeployedCodeLoaded:
    task: Task


@dataclass(frozen=True)
class DeployedCodeRejected:
    """The version cannot be used: loading it again would fail again."""

    version: str
    reason: str


@dataclass(frozen=True)
class DeployedCodeUnavailable:
    """The code repository does not answer."""

    version: str
    reason: str


CodeResult: TypeAlias = DeployedCodeLoaded | DeployedCodeRejected | DeployedCodeUnavailable
Event: TypeAlias = (
    SchedulerStarted
    | ServiceStarted
    | RunStartRequested
    | RunStopRequested
    | TriggerMessageReceived
    | OtherRunMoved
    | Transition
    | OpeningAnswered
    | CancellationAnswered
    | CodeResult
    | TimerFired[SchedulerTimer]
)
