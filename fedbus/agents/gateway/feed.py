"""The feed of the dashboard: the last message of each subject, and a buffer of the newest messages.

The gateway reads both streams once and serves all browsers from one bounded buffer:

    latest    by subject: the last transition of each entity, and the last message of each type that describes a client
    recent    the newest messages, in order of arrival

The state of a browser is a *cursor*, for example ``e812-l344``: its positions in the events stream
and in the lifecycle stream. The browser requests the records after its cursor. The gateway keeps no
queue for a browser, so a browser that reads slowly or never needs no memory. For a cursor older than
the buffer, the gateway reads the streams again; if that is too much, it raises `CursorExpired` and the
browser loads the state again.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Self

import structlog

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.agents.gateway.records import EVENTS, LIFECYCLE, FeedRecord, to_jsonable, to_record, truncate
from fedbus.bus.bus import Bus
from fedbus.bus.errors import FederationNotFound
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.common.retry import retry
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import MESSAGES, stream_subjects
from fedbus.contracts.client import Heartbeat, RoundReply
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.message import Family, Message
from fedbus.contracts.transition import Transition
from fedbus.domain.federation_view import Latest, Presence

MAX_RECORDS: Final = 20_000
MAX_RECORD_BYTES: Final = 64 * 1024**2
INITIAL_RECORDS: Final = 2_000
"""Number of past messages of each stream that the gateway reads at its start."""
MAX_CATCH_UP_RECORDS: Final = 20_000
"""Number of messages that are read again for an old cursor; beyond it the cursor is expired."""
MAX_BATCH_RECORDS: Final = 2_000
END_OF_HISTORY_S: Final = 2.0
"""Reading of past messages ends when none has arrived for this time."""

RETAINED_MESSAGES: Final[tuple[type[Message], ...]] = tuple(
    kind for kind in MESSAGES if kind.family is Family.CLIENT and kind.durable and kind is not RoundReply
)
"""Message types of which the dashboard shows the last message of each client."""

log = structlog.get_logger("fedbus.gateway")


class CursorExpired(Exception):
    """The cursor is too old, or belongs to streams that were since deleted; load the state again."""


class InvalidCursor(ValueError):
    """The text is not a valid cursor."""


@dataclass(frozen=True)
class Cursor:
    """The sequences up to which a reader has read both streams."""

    events: int = 0
    life: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a cursor such as ``e812-l344``.

        Raises:
            InvalidCursor: *text* has another form.

        """
        events, _, life = text.partition("-")
        if not (
            events[:1] == EVENTS and life[:1] == LIFECYCLE and _is_number(events[1:]) and _is_number(life[1:])
        ):
            raise InvalidCursor(f"invalid cursor {text[:40]!r}. Use the form e812-l344")
        return cls(int(events[1:]), int(life[1:]))

    def __str__(self) -> str:
        return f"{EVENTS}{self.events}-{LIFECYCLE}{self.life}"

    def advance(self, record: FeedRecord) -> "Cursor":
        if record.stream == EVENTS:
            return Cursor(max(self.events, record.sequence), self.life)
        return Cursor(self.events, max(self.life, record.sequence))

    def includes(self, record: FeedRecord) -> bool:
        return record.sequence <= (self.events if record.stream == EVENTS else self.life)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16


class Feed:
    """The events and lifecycle streams of one federation as records for the dashboard."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._latest: Latest[str, FeedRecord] = Latest()
        """By subject."""
        self._recent: deque[FeedRecord] = deque()
        self._recent_bytes = 0
        self._dropped = Cursor()
        """Position of the newest record that `_recent` no longer contains."""
        self._count = 0
        self._changed = asyncio.Event()
        self.position = Cursor()
        self.ready = asyncio.Event()
        self._presence = Presence()
        self._device_reports: dict[str, dict[str, Any]] = {}
        """Last device report of each client, as JSON data."""

    # --- reading the bus ----------------------------------------------------------------------

    async def run(self) -> None:
        """Read both streams until cancelled; wait while the federation does not exist."""

        def report(_: Exception, __: int) -> None:
            log.info("Federation not found; retrying", federation=self._bus.fed)

        while True:
            await retry(self._read, on=FederationNotFound, on_failure=report)

    async def _read(self) -> None:
        streams = {
            EVENTS: (events_stream(self._bus.fed), stream_subjects(self._bus.fed)),
            LIFECYCLE: (lifecycle_stream(self._bus.fed), [subjects.wildcard_for(self._bus.fed, Transition)]),
        }
        ends = {mark: (await self._bus.sequence_range(stream))[1] for mark, (stream, _) in streams.items()}
        await self._load_snapshot(streams)
        self._dropped = Cursor(*(max(0, ends[mark] - INITIAL_RECORDS) for mark in (EVENTS, LIFECYCLE)))
        self.position = self._dropped
        async with AsyncExitStack() as subscriptions, asyncio.TaskGroup() as group:
            for mark, (stream, filters) in streams.items():
                after = max(0, ends[mark] - INITIAL_RECORDS)
                messages = await subscriptions.enter_async_context(
                    self._bus.read_stream(stream, filters, after=after)
                )
                group.create_task(self._follow(messages), name=f"read {stream}")
            for kind in (Heartbeat, DeviceReport):
                reports = await subscriptions.enter_async_context(
                    self._bus.subscribe_ephemeral(kind, task="*")
                )
                group.create_task(self._follow_reports(reports), name=f"subscribe {kind.name}")
            with suppress(TimeoutError):  # an undecodable last message is never delivered
                await wait_within(
                    END_OF_HISTORY_S, self._wait_for_position(Cursor(ends[EVENTS], ends[LIFECYCLE]))
                )
            self.position = Cursor(
                max(self.position.events, ends[EVENTS]), max(self.position.life, ends[LIFECYCLE])
            )
            self.ready.set()

    async def _load_snapshot(self, streams: dict[str, tuple[str, list[str]]]) -> None:
        for stored in await self._bus.last_per_device(DeviceReport):
            self._apply_report(stored.message, stored.envelope.time)
        stream, filters = streams[LIFECYCLE]
        for stored in await self._bus.last_per_subject(stream, filters):
            self._retain(stored, to_record(stored))
        filters = [subjects.wildcard_for(self._bus.fed, kind) for kind in RETAINED_MESSAGES]
        for stored in await self._bus.last_per_subject(streams[EVENTS][0], filters):
            self._retain(stored, to_record(stored))

    async def _follow(self, messages: AsyncIterator[StoredMessage]) -> None:
        async for stored in messages:
            record = to_record(stored)
            self._append(record)
            self._retain(stored, record)
            self._changed.set()

    async def _follow_reports(self, reports: AsyncIterator[Message]) -> None:
        async for report in reports:
            self._apply_report(report, datetime.now(UTC))

    def _apply_report(self, report: Message, at: datetime) -> None:
        self._presence.apply(report, at)
        if isinstance(report, DeviceReport):
            self._device_reports[report.client] = truncate(to_jsonable(report.model_dump()))

    async def _wait_for_position(self, end: Cursor) -> None:
        while self.position.events < end.events or self.position.life < end.life:
            await self._wait_for_more(self._count)

    def _retain(self, stored: StoredMessage, record: FeedRecord) -> None:
        self._presence.apply(stored.message, record.at)
        if _is_retained(record):
            self._latest.offer(record.subject, record)

    def _append(self, record: FeedRecord) -> None:
        self._recent.append(record)
        self._recent_bytes += len(record.json)
        self._count += 1
        self.position = self.position.advance(record)
        while len(self._recent) > MAX_RECORDS or self._recent_bytes > MAX_RECORD_BYTES:
            oldest = self._recent.popleft()
            self._recent_bytes -= len(oldest.json)
            self._dropped = self._dropped.advance(oldest)

    def presence(self, since: datetime) -> dict[str, Any]:
        """Return the clients with a message after *since* and the device reports after *since*."""
        last_seen = {client: at.isoformat() for client, at in self._presence.last_seen.items() if at > since}
        devices = {
            client: self._device_reports[client]
            for client, device in self._presence.devices.items()
            if device.at > since
        }
        return {"heard": last_seen, "devices": devices}

    # --- serving browsers -------------------------------------------------------------------------

    def snapshot(self) -> Iterator[FeedRecord]:
        """Iterate over the last record of each retained subject."""
        return iter(list(self._latest.values()))

    def newest_records(self, limit: int) -> list[FeedRecord]:
        """Return the newest *limit* records, oldest first."""
        return list(islice(self._recent, max(0, len(self._recent) - limit), None))

    def records_in_trace(self, trace: str) -> list[FeedRecord]:
        """Return the buffered records of one trace, oldest first."""
        return sorted(
            (record for record in self._recent if record.trace == trace), key=lambda record: record.at
        )

    async def follow(self, cursor: Cursor) -> AsyncIterator[tuple[list[FeedRecord], Cursor]]:
        """Yield all records after *cursor* in batches, each with the cursor behind it; never ends.

        Raises:
            CursorExpired: the cursor is too old or belongs to other streams.

        """
        mark, records = self._count, await self.records_after(cursor)
        while True:
            for at in range(0, len(records), MAX_BATCH_RECORDS):
                batch = records[at : at + MAX_BATCH_RECORDS]
                for record in batch:
                    cursor = cursor.advance(record)
                yield batch, cursor
            await self._wait_for_more(mark)
            missed = self._count - mark
            if missed <= len(self._recent):
                mark, records = self._count, self.newest_records(missed)
            else:  # the reader is slower than the buffer is long
                mark, records = self._count, await self.records_after(cursor)

    async def _wait_for_more(self, mark: int) -> None:
        while self._count <= mark:
            self._changed.clear()
            await self._changed.wait()

    async def records_after(self, cursor: Cursor) -> list[FeedRecord]:
        """Return all records after *cursor*, in order.

        Raises:
            CursorExpired: the cursor is too old or belongs to other streams.

        """
        if cursor.events > self.position.events or cursor.life > self.position.life:
            raise CursorExpired
        if cursor.events >= self._dropped.events and cursor.life >= self._dropped.life:
            return [record for record in self._recent if not cursor.includes(record)]
        return await self._read_from_streams(cursor, self.position)

    async def _read_from_streams(self, begin: Cursor, end: Cursor) -> list[FeedRecord]:
        """Read the records between two cursors from the streams.

        Raises:
            CursorExpired: there are more than MAX_CATCH_UP_RECORDS.

        """
        if end.events - begin.events + end.life - begin.life > MAX_CATCH_UP_RECORDS:
            raise CursorExpired
        fed = self._bus.fed
        events = await self.read_window(events_stream(fed), stream_subjects(fed), begin.events, end.events)
        life = await self.read_window(
            lifecycle_stream(fed), [subjects.wildcard_for(fed, Transition)], begin.life, end.life
        )
        return sorted([*events, *life], key=lambda record: record.at)

    async def read_window(self, stream: str, filters: list[str], after: int, until: int) -> list[FeedRecord]:
        """Read the records of *stream* with a sequence above *after* and up to *until*."""
        records: list[FeedRecord] = []
        if until <= after:
            return records
        async with self._bus.read_stream(stream, filters, after=after) as messages:
            with suppress(TimeoutError):
                while not records or records[-1].sequence < until:
                    records.append(to_record(await wait_within(END_OF_HISTORY_S, anext(messages))))
        return [record for record in records if record.sequence <= until]


def _is_retained(record: FeedRecord) -> bool:
    return record.stream == LIFECYCLE or record.subject.rpartition(".")[2] in _RETAINED_NAMES


_RETAINED_NAMES: Final = frozenset(kind.name for kind in RETAINED_MESSAGES)
