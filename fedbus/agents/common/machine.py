"""The shared part of the agents' pure machines: effects that every agent performs, and the record of a lifecycle.

A machine takes one event and returns effects; the agent performs them in their order. A machine does no I/O and
reads no clock, so its tests compare lists of effects. There are three kinds of effects:

- *Action*: performed at once, without a result.
- *Query*: performed at once; its result is the next event, before any other. It is the last effect of its event.
- *Job*: performed in a task of its own; its result is an event among others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Literal, NewType, TypeVar

from fedbus.contracts.lifecycle import Changes, Data, Event, Lifecycle, State
from fedbus.contracts.message import Body, Message

Timer = TypeVar("Timer", bound=StrEnum)

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

    A record moves when a decision is taken; the agent publishes the same transition when it performs the effect.
    """

    def __init__(self, state: State, data: Data, event: Event, reason: str = "") -> None:
        self.state = state
        self.data = data
        self.event = event
        self.reason = reason

    def _advance(
        self, lifecycle: Lifecycle[State, Event, Data, Changes], event: Event, changes: Changes, reason: str
    ) -> None:
        """Follow the arrow of *event* in *lifecycle*, with *changes* of the data.

        Raises:
            IllegalTransition: The table has no such arrow.
            IllegalChange: The table does not allow these changes.

        """
        target = lifecycle.advance(self.state, event)
        self.data = lifecycle.change(event, self.data, changes)
        self.state, self.event, self.reason = target, event, reason
