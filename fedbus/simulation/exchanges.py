"""The open messages of a simulated run: each is an exchange, which belongs to a call."""

from collections import deque
from dataclasses import dataclass, field

from fedbus.learning.library import ClientReply, OutgoingMessage
from fedbus.simulation.client_spans import CallSpans
from fedbus.simulation.engine import SumRequest
from fedbus.simulation.scheduling import Job


@dataclass(slots=True, eq=False)
class PlacedPayload:
    """A payload in the engine, and how many of its messages have no reply."""

    payload: int
    size_bytes: int
    open_messages: int = 0


@dataclass(slots=True, eq=False)
class Call:
    """The messages of one `send`, or of one `post`."""

    number: int
    total: int = 0
    done: int = 0
    """Messages whose reply was handed over."""
    unsummed: int = 0
    """Messages with a reply whose update is in a sum that has not arrived."""
    failed: int = 0
    kind: str = ""
    round: int = 0
    sum_request: SumRequest | None = None
    sum_workers: set[int] = field(default_factory=set)
    """Workers with messages for the sum that were not asked for the rest of it."""
    ready: deque[ClientReply] = field(default_factory=deque)
    early: dict[int, ClientReply] = field(default_factory=dict)
    """Replies that came before an earlier one, by position, if the order is fixed."""
    next_position: int = 0
    is_posted: bool = False
    is_detached: bool = False
    """Nothing waits for it any more, and its updates are of no use: they were to be part of a sum."""
    spans: CallSpans | None = None


@dataclass(slots=True, eq=False)
class Exchange:
    """A message on its way to a worker and back."""

    message: OutgoingMessage
    round: int
    call: Call
    placed: PlacedPayload
    job: Job
    limit_s: float
    sent_at: float
    answer: ClientReply | None = None
    """The reply of the worker, before it is handed over."""
