"""A push consumer of JetStream: delivers the messages of a stream, and delivers again what is not acknowledged."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, TypeVar

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy, SequenceInfo

from fedbus.bus.memory.subject_index import matching_subjects

if TYPE_CHECKING:
    from fedbus.bus.memory.client import MemoryClient
    from fedbus.bus.memory.stream import MemoryStream, StoredRecord

NO_LIMIT = -1
MAX_DECODED = 64
"""The decoded messages that a stream keeps for further consumers."""

T = TypeVar("T")


class Deliver(Protocol):
    """Routes the messages of consumers to their subscribers."""

    def has_subscriber(self, subject: str) -> bool: ...
    def deliver(self, consumer: "PushConsumer", record: "StoredRecord", times: int) -> None: ...


@dataclass(frozen=True, slots=True)
class SequencePair:
    consumer: int
    stream: int


@dataclass(frozen=True, slots=True)
class DeliveryMetadata:
    """The metadata of a delivered message that `fedbus.bus` reads."""

    sequence: SequencePair
    num_delivered: int
    num_pending: int
    stream: str
    consumer: str


class DeliveredMsg(Msg):
    """A message of a consumer, for one subscriber."""

    def __init__(
        self,
        client: "MemoryClient",
        consumer: "PushConsumer",
        record: "StoredRecord",
        times: int,
        number: int,
    ) -> None:
        self._client = self._connection = client
        self.subject = record.subject
        self.reply = consumer.reply_prefix
        self.data = record.data
        self.headers = record.headers
        self._ackd = False
        self._sid = None
        self._consumer = consumer
        self._sequence = record.sequence
        self._times = times
        self._number = number

    @property
    def metadata(self) -> DeliveryMetadata:  # type: ignore[override]  # without the fields that fedbus does not read
        consumer = self._consumer
        return DeliveryMetadata(
            SequencePair(self._number, self._sequence),
            self._times,
            len(consumer.backlog),
            consumer.stream.config.name or "",
            consumer.name,
        )

    def decode(self, decode: Callable[[str, dict[str, str] | None, bytes], T]) -> T:
        """Return the decoded message; one that many consumers get is decoded once."""
        decoded = self._consumer.stream.decoded
        if self._sequence not in decoded:
            decoded[self._sequence] = decode(self.subject, self.headers, self.data)
            if len(decoded) > MAX_DECODED:
                del decoded[next(iter(decoded))]
        result: T = decoded[self._sequence]
        return result

    async def ack(self) -> None:
        self._settle(self._consumer.ack)

    async def nak(self, delay: float | None = None) -> None:  # noqa: ARG002 - nats-py's
        self._settle(self._consumer.nak)

    async def term(self) -> None:
        self._settle(self._consumer.ack)

    def _settle(self, settle: "_Settle") -> None:
        self._check_reply()
        self._ackd = True
        self._connection.send(lambda: settle(self._sequence))


class _Settle(Protocol):
    def __call__(self, sequence: int, /) -> None: ...


@dataclass(slots=True)
class _Pending:
    record: "StoredRecord"
    times: int
    overdue_at: float


class PushConsumer:
    """One consumer of *stream*. Its config has one delivery subject and any number of filters."""

    def __init__(self, stream: "MemoryStream", name: str, config: ConsumerConfig, deliver: Deliver) -> None:
        self.stream = stream
        self.name = name
        self.config = config
        self.subject = config.deliver_subject or ""
        self.filters = list(
            config.filter_subjects or ([config.filter_subject] if config.filter_subject else [">"])
        )
        self.reply_prefix = f"$JS.ACK.{stream.config.name}.{name}"
        self.backlog: deque[StoredRecord] = deque()
        """The messages that are not delivered yet, or have to be delivered again. The stream may have dropped them."""
        self.delivered = 0
        """The number of deliveries."""
        self.last_delivered = 0
        """The highest stream sequence that was delivered."""
        self._deliver = deliver
        self._pending: dict[int, _Pending] = {}
        self._times: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_acknowledged = config.ack_policy is not AckPolicy.NONE
        limit = config.max_ack_pending or NO_LIMIT
        self._max_pending = limit if self._is_acknowledged and limit > 0 else 1 << 60
        self._created = datetime.now(UTC)
        self._choose_first()

    def _choose_first(self) -> None:
        """Queue the stored messages that the deliver policy asks for."""
        records, config = self.stream.records, self.config
        policy = config.deliver_policy or DeliverPolicy.ALL
        if policy is DeliverPolicy.NEW:
            self.last_delivered = self.stream.last_sequence
            return
        if policy is DeliverPolicy.LAST_PER_SUBJECT:
            subjects = matching_subjects(iter(self.stream.by_subject), self.filters)
            self.backlog.extend(
                records[sequence] for sequence in sorted(self.stream.by_subject[one][-1] for one in subjects)
            )
            return
        since = 0
        if policy is DeliverPolicy.BY_START_SEQUENCE:
            since = config.opt_start_seq or 0
        start_ns = config.opt_start_time.timestamp() * 1e9 if config.opt_start_time else 0.0
        wanted = set(matching_subjects(iter(self.stream.by_subject), self.filters))
        self.last_delivered = max(0, since - 1)
        self.backlog.extend(
            one
            for one in records.values()
            if one.sequence >= since and one.time_ns >= start_ns and one.subject in wanted
        )

    # --- delivery -----------------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        return self._deliver.has_subscriber(self.subject)

    def on_stored(self, record: "StoredRecord") -> None:
        if self.backlog or len(self._pending) >= self._max_pending or not self.is_active:
            self.backlog.append(record)
        else:
            self._send(record)

    def pump(self) -> None:
        """Deliver as much of the backlog as the limit of unacknowledged messages allows."""
        backlog = self.backlog
        while backlog and len(self._pending) < self._max_pending and self.is_active:
            self._send(backlog.popleft())

    def _send(self, record: "StoredRecord") -> None:
        sequence = record.sequence
        times = self._times.pop(sequence, 0) + 1
        self.delivered += 1
        self.last_delivered = max(self.last_delivered, sequence)
        if self._is_acknowledged:
            loop = asyncio.get_running_loop()
            wait_s = float(self.config.ack_wait or 30.0)
            self._pending[sequence] = _Pending(record, times, loop.time() + wait_s)
            if self._timer is None:
                self._timer = loop.call_later(wait_s, self._on_timer)
        self._deliver.deliver(self, record, times)

    # --- acknowledgements ---------------------------------------------------------------------------

    def ack(self, sequence: int) -> None:
        if self._pending.pop(sequence, None) is not None and self.backlog:
            self.pump()

    def nak(self, sequence: int) -> None:
        if (pending := self._pending.pop(sequence, None)) is not None:
            self._deliver_again([pending])

    def _on_timer(self) -> None:
        """Deliver again what was not acknowledged in time."""
        now = asyncio.get_running_loop().time()
        self._timer = None
        overdue = []
        for pending in self._pending.values():  # in the order of delivery
            if pending.overdue_at > now:
                self._timer = asyncio.get_running_loop().call_at(pending.overdue_at, self._on_timer)
                break
            overdue.append(pending)
        for pending in overdue:
            del self._pending[pending.record.sequence]
        self._deliver_again(overdue)

    def _deliver_again(self, overdue: list[_Pending]) -> None:
        limit = self.config.max_deliver or NO_LIMIT
        again = [one for one in overdue if limit < 1 or one.times < limit]
        self._times |= {one.record.sequence: one.times for one in again}
        again.sort(key=lambda one: one.record.sequence, reverse=True)
        self.backlog.extendleft(one.record for one in again)
        self.pump()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.backlog.clear()
        self._pending.clear()

    def info(self) -> ConsumerInfo:
        return ConsumerInfo(
            name=self.name,
            stream_name=self.stream.config.name or "",
            config=self.config,
            created=self._created,
            delivered=SequenceInfo(consumer_seq=self.delivered, stream_seq=self.last_delivered),
            num_ack_pending=len(self._pending),
            num_pending=len(self.backlog),
            push_bound=self.is_active,
        )
