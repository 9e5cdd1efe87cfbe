"""The part of a `Messenger` that does not depend on how its messages travel."""

import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Final, Generic, TypeVar

from fedbus.contracts.run import RunPlan
from fedbus.learning.library import ClientReply, MessengerClosed, OutgoingMessage, RoundTally
from fedbus.learning.payload import Payload
from fedbus.learning.round_tallies import RoundTallies

MAX_UNCLAIMED_REPLIES: Final = 10_000
"""The limit of replies to posted messages that are neither taken nor collected; the oldest is dropped."""

_NO_PAYLOAD: Final = Payload.pack(())
T = TypeVar("T")


class RunMessenger:
    """The plan of a run, the tallies of its rounds, and its end. *changed* is the lock, notified at the end."""

    def __init__(self, run: str, plan: RunPlan, changed: threading.Condition) -> None:
        self._run = run
        self._plan = plan
        self._changed = changed
        self._closed: MessengerClosed | None = None
        """Why the run has ended; None before."""
        self._latest_round = 0
        self._tallies = RoundTallies()

    @property
    def run(self) -> str:
        return self._run

    @property
    def plan(self) -> RunPlan:
        return self._plan

    def accept(self, reply: ClientReply, *, samples: int = 0) -> None:
        with self._changed:
            self._tallies.accept(reply, samples)

    def reject(self, reply: ClientReply, reason: str) -> None:
        with self._changed:
            self._tallies.reject(reply, reason)

    def tally(self, round_number: int) -> RoundTally:
        with self._changed:
            return self._tallies.copy(round_number)

    def _end(self, reason: str) -> None:
        """End all current and later calls with MessengerClosed(*reason*). The first reason counts."""
        with self._changed:
            self._closed = self._closed or MessengerClosed(reason)
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed

    def _limit_s(self, message: OutgoingMessage) -> float:
        """Return the time after which *message* has no reply."""
        round_s = self._plan.round_s
        return round_s if message.ttl_s is None else min(round_s, message.ttl_s)

    def _round_of(self, message: OutgoingMessage) -> int:
        """Return the round that *message* counts for: its own, else that of the message before it."""
        with self._changed:
            if message.round is not None:
                self._latest_round = message.round
            return self._latest_round


class UnclaimedReplies(Generic[T]):
    """The replies to posted messages that are neither taken nor collected, in order of arrival."""

    def __init__(self) -> None:
        self._replies: dict[str, T] = {}

    def __bool__(self) -> bool:
        return bool(self._replies)

    def __contains__(self, message_id: str) -> bool:
        return message_id in self._replies

    def add(self, message_id: str, reply: T) -> None:
        """Add the reply to a message. Above the limit, the oldest reply is dropped."""
        self._replies[message_id] = reply
        if len(self._replies) > MAX_UNCLAIMED_REPLIES:
            del self._replies[next(iter(self._replies))]

    def take(self) -> T | None:
        """Remove and return the oldest reply; None if there is none."""
        return self._replies.pop(next(iter(self._replies))) if self._replies else None

    def collect(self, message_ids: Iterable[str]) -> list[T]:
        """Remove and return the replies to *message_ids* that have arrived."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]


def without_payload(message: OutgoingMessage) -> OutgoingMessage:
    """Return *message* without its payload, so that a waiting reply does not keep it in memory."""
    return replace(message, payload=_NO_PAYLOAD)
