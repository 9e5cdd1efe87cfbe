"""The nodes of a run and their pending replies, with deadlines: events in, effects out. No clock, loop or bus.

A node is present from its `ClientJoined` until it fails or its heartbeats stop. A heartbeat alone also makes
it present, since it may have joined a server that was lost. A node whose heartbeats stopped is present again
after the next one; a node that failed must join again. When a node leaves, each of its open messages gets a
`ReplyLost` with the reason at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, assert_never

from fedbus.contracts.client import ClientJoined, FailTrain, Heartbeat, RoundReply
from fedbus.learning.deadlines import Deadlines

Event: TypeAlias = ClientJoined | Heartbeat | FailTrain | RoundReply


class LostReason(StrEnum):
    """Why a message has no reply."""

    NODE = "node"
    """The node failed, or its heartbeats stopped."""
    TIME = "time"
    """The deadline of the message has passed."""


@dataclass(frozen=True)
class SentMessage:
    """A message that waits for its reply. *deadline* is in seconds of the caller's clock."""

    message_id: str
    client: str
    timeout_s: float
    deadline: float

    @property
    def sent_at(self) -> float:
        """The time of sending, in seconds of the same clock."""
        return self.deadline - self.timeout_s


@dataclass(frozen=True)
class ReplyReceived:
    """The reply to an open message has arrived."""

    sent: SentMessage
    reply: RoundReply


@dataclass(frozen=True)
class ReplyLost:
    """An open message gets no reply."""

    sent: SentMessage
    lost_reason: LostReason
    reason: str


@dataclass(frozen=True)
class NodesChanged:
    """A node joined or left."""


Effect: TypeAlias = ReplyReceived | ReplyLost | NodesChanged


class RoundTracker:
    """The nodes and open messages of one run."""

    def __init__(self, run: str, *, lost_after_s: float) -> None:
        self._run = run
        self._lost_after_s = lost_after_s
        self._last_contact: dict[str, float] = {}
        """Time of the last event of each present client."""
        self._failed: dict[str, str] = {}
        self._open_messages: dict[str, SentMessage] = {}
        self._contact_limits = Deadlines()
        """When each present client expires without another event."""
        self._message_limits = Deadlines()
        """The deadlines of the open messages."""

    # --- state ----------------------------------------------------------------------------

    @property
    def nodes(self) -> list[str]:
        return list(self._last_contact)

    @property
    def failed(self) -> dict[str, str]:
        """Reasons by client, of the clients that failed and have not joined again."""
        return dict(self._failed)

    def is_open(self, message_id: str) -> bool:
        return message_id in self._open_messages

    def next_deadline(self) -> float | None:
        """Return the earliest time at which `expire` can have an effect, if no event arrives before; or None."""
        limits = (self._contact_limits.earliest(), self._message_limits.earliest())
        return min((limit for limit in limits if limit is not None), default=None)

    # --- events ---------------------------------------------------------------------------

    def admit(self, clients: Iterable[str], now: float) -> list[Effect]:
        """Add *clients* whose `ClientJoined` another agent received."""
        return [effect for client in clients for effect in self._add_node(client, now)]

    def record_sent(self, sent: SentMessage) -> list[Effect]:
        """Register an outgoing message. If its node is not present, its reply is lost at once."""
        if sent.client in self._last_contact:
            self._open_messages[sent.message_id] = sent
            self._message_limits.set(sent.message_id, sent.deadline)
            return []
        reason = self._failed.get(sent.client, "the client is not connected")
        return [ReplyLost(sent, LostReason.NODE, reason)]

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Handle an event of a client. Events of other runs have no effect."""
        if event.run != self._run:
            return []
        match event:
            case ClientJoined(client=client):
                self._failed.pop(client, None)
                return self._add_node(client, now)
            case Heartbeat(client=client):
                return [] if client in self._failed else self._add_node(client, now)
            case FailTrain(client=client, reason=reason):
                self._failed[client] = reason
                return self._remove_node(client, reason)
            case RoundReply():
                return self._on_reply(event, now)
            case _:
                assert_never(event)

    def expire(self, now: float, *, connected: bool = True) -> list[Effect]:
        """Expire deadlines and clients without heartbeats. While NATS is disconnected, no client expires."""
        if not connected:
            for client in self._last_contact:
                self._record_contact(client, now)
        silent = [
            client for client, contact in self._last_contact.items() if now - contact >= self._lost_after_s
        ]
        lost = [
            effect
            for client in silent
            for effect in self._remove_node(client, f"no heartbeat for {self._lost_after_s:g} s")
        ]
        late = [sent for sent in self._open_messages.values() if sent.deadline <= now]
        return lost + [
            self._close(sent, LostReason.TIME, f"no reply within {sent.timeout_s:g} s") for sent in late
        ]

    def _add_node(self, client: str, now: float) -> list[Effect]:
        new = client not in self._last_contact
        self._record_contact(client, now)
        return [NodesChanged()] if new else []

    def _record_contact(self, client: str, now: float) -> None:
        self._last_contact[client] = now
        self._contact_limits.set(client, now + self._lost_after_s)

    def _remove_node(self, client: str, reason: str) -> list[Effect]:
        self._last_contact.pop(client, None)
        self._contact_limits.remove(client)
        unanswered = [sent for sent in self._open_messages.values() if sent.client == client]
        return [NodesChanged(), *(self._close(sent, LostReason.NODE, reason) for sent in unanswered)]

    def _on_reply(self, reply: RoundReply, now: float) -> list[Effect]:
        """Close the message of *reply*. A late, repeated or foreign reply counts only as contact."""
        if reply.client in self._last_contact:
            self._record_contact(reply.client, now)
        sent = self._open_messages.get(reply.reply_to)
        if sent is None or sent.client != reply.client:
            return []
        self._forget(sent)
        return [ReplyReceived(sent, reply)]

    def _close(self, sent: SentMessage, lost_reason: LostReason, reason: str) -> ReplyLost:
        self._forget(sent)
        return ReplyLost(sent, lost_reason, reason)

    def _forget(self, sent: SentMessage) -> None:
        del self._open_messages[sent.message_id]
        self._message_limits.remove(sent.message_id)
