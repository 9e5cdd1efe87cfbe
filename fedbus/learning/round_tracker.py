"""Who is there, who owes an answer, and until when: events in, effects out. No clock, no loop, no bus.

A node is *there* from its `Joined` (or a heartbeat: it joined a server that was lost) until it
fails or falls silent. One that fell silent is there again when it is heard again; one that
failed must join again. Whoever goes owes nothing any more: each open message of its is
unanswered, with the reason, at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, assert_never

from fedbus.contracts.client import ClientJoined, FailTrain, Heartbeat, RoundReply

Event: TypeAlias = ClientJoined | Heartbeat | FailTrain | RoundReply


class LostReason(StrEnum):
    """Why a message stays unanswered."""

    NODE = "node"
    """Its node failed or fell silent."""
    TIME = "time"
    """Its deadline has passed."""


@dataclass(frozen=True)
class SentMessage:
    """A message that waits for its answer."""

    message_id: str
    client: str
    timeout_s: float
    deadline: float

    @property
    def at(self) -> float:
        """When it was sent."""
        return self.deadline - self.timeout_s


@dataclass(frozen=True)
class ReplyReceived:
    sent: SentMessage
    reply: RoundReply


@dataclass(frozen=True)
class ReplyLost:
    sent: SentMessage
    gone: LostReason
    reason: str


@dataclass(frozen=True)
class NodesChanged:
    """Somebody came or went."""


Effect: TypeAlias = ReplyReceived | ReplyLost | NodesChanged


class RoundTracker:
    """The book of one run."""

    def __init__(self, run: str, *, lost_after_s: float) -> None:
        self._run = run
        self._lost_after_s = lost_after_s
        self._heard: dict[str, float] = {}
        """When each client that is there was last heard."""
        self._failed: dict[str, str] = {}
        self._open: dict[str, SentMessage] = {}

    # --- what is so -----------------------------------------------------------------------

    @property
    def nodes(self) -> list[str]:
        return list(self._heard)

    @property
    def failed(self) -> dict[str, str]:
        """Reasons by client, of those who are out until they join again."""
        return dict(self._failed)

    def is_open(self, message_id: str) -> bool:
        return message_id in self._open

    def next_wake(self) -> float | None:
        """When `passed` will next have something to say, unless events come before."""
        silent = (heard + self._lost_after_s for heard in self._heard.values())
        due = (sent.deadline for sent in self._open.values())
        return min((*silent, *due), default=None)

    # --- what happens ---------------------------------------------------------------------

    def admit(self, clients: Iterable[str], now: float) -> list[Effect]:
        """These have joined: somebody else heard it."""
        return [effect for client in clients for effect in self._arrived(client, now)]

    def sent(self, sent: SentMessage) -> list[Effect]:
        """A message goes out; one to a node that is not there is unanswered at once."""
        if sent.client in self._heard:
            self._open[sent.message_id] = sent
            return []
        reason = self._failed.get(sent.client, "it is not there")
        return [ReplyLost(sent, LostReason.NODE, reason)]

    def handle(self, event: Event, now: float) -> list[Effect]:
        if event.run != self._run:
            return []
        match event:
            case ClientJoined(client=client):
                self._failed.pop(client, None)
                return self._arrived(client, now)
            case Heartbeat(client=client):
                return [] if client in self._failed else self._arrived(client, now)
            case FailTrain(client=client, reason=reason):
                self._failed[client] = reason
                return self._left(client, reason)
            case RoundReply():
                return self._replied(event, now)
            case _:
                assert_never(event)

    def passed(self, now: float, *, connected: bool = True) -> list[Effect]:
        """Time has passed. While the bus is away, nobody's silence counts."""
        if not connected:
            self._heard = dict.fromkeys(self._heard, now)
        silent = [client for client, heard in self._heard.items() if now - heard >= self._lost_after_s]
        lost = [
            effect
            for client in silent
            for effect in self._left(client, f"nothing was heard of it for {self._lost_after_s:g} s")
        ]
        late = [sent for sent in self._open.values() if sent.deadline <= now]
        return lost + [
            self._close(sent, LostReason.TIME, f"no answer within {sent.timeout_s:g} s") for sent in late
        ]

    # --- how --------------------------------------------------------------------------------

    def _arrived(self, client: str, now: float) -> list[Effect]:
        new = client not in self._heard
        self._heard[client] = now
        return [NodesChanged()] if new else []

    def _left(self, client: str, reason: str) -> list[Effect]:
        self._heard.pop(client, None)
        owed = [sent for sent in self._open.values() if sent.client == client]
        return [NodesChanged(), *(self._close(sent, LostReason.NODE, reason) for sent in owed)]

    def _replied(self, reply: RoundReply, now: float) -> list[Effect]:
        """An answer nobody waits for (late, repeated, or to somebody else's message) is only a sign of life."""
        if reply.client in self._heard:
            self._heard[reply.client] = now
        sent = self._open.get(reply.reply_to)
        if sent is None or sent.client != reply.client:
            return []
        del self._open[reply.reply_to]
        return [ReplyReceived(sent, reply)]

    def _close(self, sent: SentMessage, gone: LostReason, reason: str) -> ReplyLost:
        del self._open[sent.message_id]
        return ReplyLost(sent, gone, reason)
