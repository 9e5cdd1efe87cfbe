"""A stream of JetStream in memory: messages by sequence, with the limits of its config."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from nats.js.api import ConsumerConfig, PubAck, StreamConfig, StreamInfo, StreamState
from nats.js.errors import APIError, NotFoundError

from fedbus.bus.memory.consumer import Deliver, PushConsumer
from fedbus.bus.memory.subject_index import SubjectIndex
from fedbus.common import clock

MESSAGE_ID_HEADER: Final = "Nats-Msg-Id"
EXPECTED_SEQUENCE_HEADER: Final = "Nats-Expected-Last-Subject-Sequence"
WRONG_SEQUENCE_CODE: Final = 10071
TOO_LARGE_CODE: Final = 10054
CONSUMER_NOT_FOUND_CODE: Final = 10014
OVERHEAD_BYTES: Final = 40
"""The approximate size that nats-server adds to the subject, headers and body of a message, in bytes."""


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """One message of a stream."""

    sequence: int
    subject: str
    data: bytes
    headers: dict[str, str] | None
    time_ns: int

    @property
    def size(self) -> int:
        return len(self.subject) + len(self.data) + OVERHEAD_BYTES


class MemoryStream:
    """One stream. *history* limits the messages on one subject, if it is less than the config's own limit."""

    def __init__(self, config: StreamConfig, deliver: Deliver, *, history: int | None) -> None:
        self.config = config
        self.records: dict[int, StoredRecord] = {}
        self.by_subject: dict[str, list[int]] = {}
        self.last_sequence = 0
        self.consumers: dict[str, PushConsumer] = {}
        self.decoded: dict[int, Any] = {}
        """The messages that were decoded last, by sequence."""
        self._deliver = deliver
        self._history = history
        self._index: SubjectIndex[PushConsumer] = SubjectIndex()
        self._ids: dict[str, tuple[int, int]] = {}
        """Sequence and time of the messages in the duplicate window, by id."""
        self._bytes = 0
        self._names = itertools.count(1)

    # --- publish --------------------------------------------------------------------------------------

    def store(self, subject: str, data: bytes, headers: dict[str, str] | None) -> PubAck:
        """Store a message, unless it is a repetition.

        Raises:
            APIError: The message is too large, or another message is the last on *subject*.

        """
        name, now_ns = self.config.name or "", clock.time_ns()
        headers = headers or {}
        if (key := headers.get(MESSAGE_ID_HEADER)) is not None:
            self._forget_ids(now_ns)
            if (known := self._ids.get(key)) is not None:
                return PubAck(stream=name, seq=known[0], duplicate=True)
        if (limit := self.config.max_msg_size or 0) > 0 and len(data) > limit:
            raise APIError(
                code=400, description="message size exceeds maximum allowed", err_code=TOO_LARGE_CODE
            )
        self.expire(now_ns)
        self._check_expected(subject, headers)
        self.last_sequence += 1
        record = StoredRecord(self.last_sequence, subject, data, headers, now_ns)
        self.records[record.sequence] = record
        self.by_subject.setdefault(subject, []).append(record.sequence)
        self._bytes += record.size
        if key is not None:
            self._ids[key] = record.sequence, now_ns
        self._apply_limits(subject)
        for consumer in self._index.match(subject):
            consumer.on_stored(record)
        return PubAck(stream=name, seq=record.sequence)

    def _check_expected(self, subject: str, headers: dict[str, str]) -> None:
        if (expected := headers.get(EXPECTED_SEQUENCE_HEADER)) is None:
            return
        last = self.by_subject[subject][-1] if subject in self.by_subject else 0
        if int(expected) != last:
            raise APIError(code=400, description=f"wrong last sequence: {last}", err_code=WRONG_SEQUENCE_CODE)

    def _forget_ids(self, now_ns: int) -> None:
        oldest_ns = now_ns - int((self.config.duplicate_window or 120.0) * 1e9)
        while self._ids:
            oldest = next(iter(self._ids))
            if self._ids[oldest][1] > oldest_ns:
                return
            del self._ids[oldest]

    def _apply_limits(self, subject: str) -> None:
        sequences = self.by_subject[subject]
        per_subject = self.config.max_msgs_per_subject or 0
        limits = [one for one in (per_subject, self._history or 0) if one > 0]
        while limits and len(sequences) > min(limits):
            self._remove(sequences[0])
        max_bytes = self.config.max_bytes or 0
        while max_bytes > 0 and self._bytes > max_bytes:
            self._remove(next(iter(self.records)))

    def expire(self, now_ns: int) -> None:
        """Remove the messages that are older than the config allows."""
        if not (max_age_s := self.config.max_age or 0.0):
            return
        oldest_ns = now_ns - int(max_age_s * 1e9)
        while self.records:
            first = next(iter(self.records.values()))
            if first.time_ns > oldest_ns:
                return
            self._remove(first.sequence)

    def _remove(self, sequence: int) -> None:
        record = self.records.pop(sequence)
        self._bytes -= record.size
        sequences = self.by_subject[record.subject]
        sequences.remove(sequence)
        if not sequences:
            del self.by_subject[record.subject]

    # --- reads ----------------------------------------------------------------------------------------

    def last_on(self, subject: str) -> StoredRecord:
        """Return the last message on *subject*.

        Raises:
            NotFoundError: There is none.

        """
        self.expire(clock.time_ns())
        if subject not in self.by_subject:
            raise NotFoundError(code=404, description="no message found", err_code=10037)
        return self.records[self.by_subject[subject][-1]]

    def at(self, sequence: int) -> StoredRecord:
        """Return the message with *sequence*; raises NotFoundError."""
        if sequence not in self.records:
            raise NotFoundError(code=404, description="no message found", err_code=10037)
        return self.records[sequence]

    def info(self) -> StreamInfo:
        self.expire(clock.time_ns())
        first = next(iter(self.records), self.last_sequence + 1 if self.last_sequence else 0)
        return StreamInfo(
            config=self.config,
            state=StreamState(
                messages=len(self.records),
                bytes=self._bytes,
                first_seq=first,
                last_seq=self.last_sequence,
                consumer_count=len(self.consumers),
            ),
        )

    # --- consumers --------------------------------------------------------------------------------------

    def add_consumer(self, config: ConsumerConfig) -> PushConsumer:
        """Create a consumer; one that exists stays as it is, with the new config."""
        self.expire(clock.time_ns())
        name = config.durable_name or config.name or f"ephemeral{next(self._names)}"
        if (present := self.consumers.get(name)) is not None:
            present.config = config
            return present
        consumer = PushConsumer(self, name, config, self._deliver)
        self.consumers[name] = consumer
        for pattern in consumer.filters:
            self._index.add(pattern, consumer)
        consumer.pump()
        return consumer

    def delete_consumer(self, name: str) -> PushConsumer:
        """Delete a consumer; raises NotFoundError."""
        if name not in self.consumers:
            raise NotFoundError(code=404, description="consumer not found", err_code=CONSUMER_NOT_FOUND_CODE)
        consumer = self.consumers.pop(name)
        for pattern in consumer.filters:
            self._index.remove(pattern, consumer)
        consumer.close()
        return consumer

    def __iter__(self) -> Iterator[StoredRecord]:
        return iter(self.records.values())
