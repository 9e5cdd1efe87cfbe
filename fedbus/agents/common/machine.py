"""What the pure machines of the agents share: effects that every agent performs, and the record of a lifecycle.

A machine takes one event and returns effects; the agent performs them in their order. A machine does no I/O and
reads no clock, so its tests compare lists of effects.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Literal, NewType, TypeVar

from fedbus.contracts.message import Body, LifecycleData, Message

Timer = TypeVar("Timer", bound=StrEnum)
State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)
Data = TypeVar("Data", bound=LifecycleData)

RequestId = NewType("RequestId", int)
"""Identifies the reply that a request waits for, within one process."""


# --- effects ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Publish:
    message: Message


@dataclass(frozen=True)
class Reply:
    """Answer a request."""

    id: RequestId
    body: Body


@dataclass(frozen=True)
class StartTimer(Generic[Timer]):
    """Fire *timer* after *delay_s*; a timer of the same name is replaced."""

    timer: Timer
    delay_s: float


@dataclass(frozen=True)
class RetryLater(Generic[Timer]):
    """Fire *timer* after the backoff of *attempt*, which has jitter."""

    timer: Timer
    attempt: int


@dataclass(frozen=True)
class CancelTimer(Generic[Timer]):
    timer: Timer


@dataclass(frozen=True)
class Log:
    level: Literal["debug", "info", "warning"]
    event: str
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FinishStartup:
    """Consume messages from now on."""


# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimerFired(Generic[Timer]):
    timer: Timer


# --- lifecycles -------------------------------------------------------------------------------------


class LifecycleRecord(Generic[State, Event, Data]):
    """The state, the data and the last event of an entity.

    A record moves when a decision is taken; the effect of the decision has the agent publish the same transition.
    """

    def __init__(self, state: State, data: Data, event: Event, reason: str = "") -> None:
        self.state = state
        self.data = data
        self.event = event
        self.reason = reason
