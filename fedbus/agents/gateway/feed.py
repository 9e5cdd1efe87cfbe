"""What the dashboard knows: the last word on every subject, and the newest of what was said.

Both streams are read once, by the gateway, and told to every browser from one bounded memory:

    latest    by subject, the last transition of each thing and the last of each word that says how a client does
    recent    the newest messages in the order in which they came

A browser is a *cursor*, ``e812-l344``: how far it has come in the events stream and in the life
stream. It asks for what comes after; nobody keeps a queue for it, so a browser that is slow, or
never reads, costs nothing. One that comes back with an old cursor is read the streams themselves,
and one that was away for too long is told to begin anew (`Lost`).
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

from fedbus.agents.common.asyncio_tools import backoff_s, wait_within
from fedbus.agents.gateway.records import EVENTS, LIFECYCLE, FeedRecord, to_jsonable, to_record, truncate
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.errors import FederationNotFound
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import MESSAGES, stream_subjects
from fedbus.contracts.client import Heartbeat, RoundReply
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.message import Family, Message
from fedbus.contracts.transition import Transition

MAX_RECORDS: Final = 20_000
MAX_RECORD_BYTES: Final = 64 * 1024**2
INITIAL_RECORDS: Final = 2_000
"""How much of the past of each stream is read at the start."""
MAX_CATCH_UP_RECORDS: Final = 20_000
"""How many messages a browser that was away is read from the streams; after that it begins anew."""
MAX_BATCH_RECORDS: Final = 2_000
END_OF_HISTORY_S: Final = 2.0
"""When nothing more of the past has come for so long, that was all there is."""

RETAINED_MESSAGES: Final[tuple[type[Message], ...]] = tuple(
    kind for kind in MESSAGES if kind.family is Family.CLIENT and kind.durable and kind is not RoundReply
)
"""Of these words the last of each client is part of what the dashboard shows."""

log = structlog.get_logger("fedbus.gateway")


class CursorExpired(Exception):
    """The cursor is of another federation's life, or too old: begin anew."""


class InvalidCursor(ValueError):
    """Not a cursor."""


@dataclass(frozen=True)
class Cursor:
    """How far somebody has come in both streams."""

    events: int = 0
    life: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """The cursor ``e812-l344``; raises BadCursor."""
        events, _, life = text.partition("-")
        if not (
            events[:1] == EVENTS and life[:1] == LIFECYCLE and _is_number(events[1:]) and _is_number(life[1:])
        ):
            raise InvalidCursor(f"{text[:40]!r} is no cursor: it looks like e812-l344")
        return cls(int(events[1:]), int(life[1:]))

    def __str__(self) -> str:
        return f"{EVENTS}{self.events}-{LIFECYCLE}{self.life}"

    def advance(self, one: FeedRecord) -> "Cursor":
        if one.stream == EVENTS:
            return Cursor(max(self.events, one.sequence), self.life)
        return Cursor(self.events, max(self.life, one.sequence))

    def has(self, one: FeedRecord) -> bool:
        return one.sequence <= (self.events if one.stream == EVENTS else self.life)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16


class Feed:
    """The two streams of one federation, as the dashboard tells them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._latest: dict[str, FeedRecord] = {}
        self._recent: deque[FeedRecord] = deque()
        self._recent_bytes = 0
        self._dropped = Cursor()
        """Up to where `_recent` no longer reaches back."""
        self._count = 0
        self._changed = asyncio.Event()
        self.position = Cursor()
        self.ready = asyncio.Event()
        self.heard: dict[str, datetime] = {}
        """When each client was last heard of."""
        self.devices: dict[str, tuple[datetime, dict[str, Any]]] = {}
        """How each device is, as it said last, and when."""

    # --- reading the bus ----------------------------------------------------------------------

    async def run(self) -> None:
        """Read both streams until cancelled; waits for a federation that is not there yet."""
        attempt = 0
        while True:
            try:
                await self._read()
            except FederationNotFound:
                log.info("no federation yet", federation=self._bus.fed)
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1

    async def _read(self) -> None:
        streams = {
            EVENTS: (events_stream(self._bus.fed), stream_subjects(self._bus.fed)),
            LIFECYCLE: (lifecycle_stream(self._bus.fed), [subjects.wildcard_for(self._bus.fed, Transition)]),
        }
        ends = {mark: (await self._bus.sequence_range(stream))[1] for mark, (stream, _) in streams.items()}
        await self._load_snapshot(streams)
        self._dropped = Cursor(*(max(0, ends[mark] - INITIAL_RECORDS) for mark in (EVENTS, LIFECYCLE)))
        self.position = self._dropped
        async with AsyncExitStack() as watching, asyncio.TaskGroup() as group:
            for mark, (stream, wanted) in streams.items():
                after = max(0, ends[mark] - INITIAL_RECORDS)
                seen = await watching.enter_async_context(self._bus.watch(stream, wanted, after=after))
                group.create_task(self._follow(_iter_records(seen)), name=f"read {stream}")
            for kind in (Heartbeat, DeviceReport):
                overheard = await watching.enter_async_context(self._bus.subscribe_ephemeral(kind, task="*"))
                group.create_task(self._follow_heartbeats(overheard), name=f"hear {kind.word}")
            with suppress(TimeoutError):  # what is at the end may be unreadable: then it never comes
                await wait_within(
                    END_OF_HISTORY_S, self._wait_for_position(Cursor(ends[EVENTS], ends[LIFECYCLE]))
                )
            self.position = Cursor(
                max(self.position.events, ends[EVENTS]), max(self.position.life, ends[LIFECYCLE])
            )
            self.ready.set()

    async def _load_snapshot(self, streams: dict[str, tuple[str, list[str]]]) -> None:
        stream, wanted = streams[LIFECYCLE]
        for seen in await self._bus.last_per_subject(stream, wanted):
            self._retain(to_record(seen))
        notes = [subjects.wildcard_for(self._bus.fed, kind) for kind in RETAINED_MESSAGES]
        for seen in await self._bus.last_per_subject(streams[EVENTS][0], notes):
            self._retain(to_record(seen))
        for seen in await self._bus.latest(DeviceReport):
            self._record_heartbeat(seen.message, seen.envelope.time)

    async def _follow(self, records: AsyncIterator[FeedRecord]) -> None:
        async for one in records:
            self._remember(one)
            self._retain(one)
            self._changed.set()

    async def _follow_heartbeats(self, overheard: AsyncIterator[Message]) -> None:
        async for one in overheard:
            self._record_heartbeat(one, datetime.now(UTC))

    def _record_heartbeat(self, one: Message, at: datetime) -> None:
        match one:
            case Heartbeat():
                self.heard[one.client] = at
            case DeviceReport():
                self.heard[one.client] = at
                self.devices[one.client] = (at, truncate(to_jsonable(one.model_dump())))

    async def _wait_for_position(self, end: Cursor) -> None:
        while self.position.events < end.events or self.position.life < end.life:
            await self._wait_for_more(self._count)

    def _retain(self, one: FeedRecord) -> None:
        before = self._latest.get(one.subject)
        if (before is None or before.sequence < one.sequence) and _is_retained(one):
            self._latest[one.subject] = one
        if one.speaker not in subjects.RESERVED_OWNERS and self.heard.get(one.speaker, one.at) <= one.at:
            self.heard[one.speaker] = one.at

    def _remember(self, one: FeedRecord) -> None:
        self._recent.append(one)
        self._recent_bytes += len(one.json)
        self._count += 1
        self.position = self.position.advance(one)
        while len(self._recent) > MAX_RECORDS or self._recent_bytes > MAX_RECORD_BYTES:
            oldest = self._recent.popleft()
            self._recent_bytes -= len(oldest.json)
            self._dropped = self._dropped.advance(oldest)

    def presence(self, since: datetime) -> dict[str, Any]:
        """Which clients were heard of after *since*, and how their devices are."""
        heard = {client: at.isoformat() for client, at in self.heard.items() if at > since}
        devices = {client: report for client, (at, report) in self.devices.items() if at > since}
        return {"heard": heard, "devices": devices}

    # --- telling browsers -------------------------------------------------------------------------

    def standing(self) -> Iterator[FeedRecord]:
        """The last word on every subject."""
        return iter(list(self._latest.values()))

    def newest(self, limit: int) -> list[FeedRecord]:
        """What was said last, oldest first."""
        return list(islice(self._recent, max(0, len(self._recent) - limit), None))

    def records_in_trace(self, trace: str) -> list[FeedRecord]:
        """What is remembered of one trace, oldest first."""
        return sorted((one for one in self._recent if one.trace == trace), key=lambda one: one.at)

    async def follow(self, cursor: Cursor) -> AsyncIterator[tuple[list[FeedRecord], Cursor]]:
        """What came after *cursor* and what comes, some at a time, and how far that leads; raises Lost."""
        mark, records = self._count, await self.after(cursor)
        while True:
            for at in range(0, len(records), MAX_BATCH_RECORDS):
                part = records[at : at + MAX_BATCH_RECORDS]
                for one in part:
                    cursor = cursor.advance(one)
                yield part, cursor
            await self._wait_for_more(mark)
            missed = self._count - mark
            if missed <= len(self._recent):
                mark, records = self._count, self.newest(missed)
            else:  # slower than what is remembered
                mark, records = self._count, await self.after(cursor)

    async def _wait_for_more(self, mark: int) -> None:
        while self._count <= mark:
            self._changed.clear()
            await self._changed.wait()

    async def after(self, cursor: Cursor) -> list[FeedRecord]:
        """All that came after *cursor*, in order; raises Lost."""
        if cursor.events > self.position.events or cursor.life > self.position.life:
            raise CursorExpired
        if cursor.events >= self._dropped.events and cursor.life >= self._dropped.life:
            return [one for one in self._recent if not cursor.has(one)]
        return await self._read_from_streams(cursor, self.position)

    async def _read_from_streams(self, begin: Cursor, end: Cursor) -> list[FeedRecord]:
        """From the streams themselves, for whoever was away; raises Lost where that is too much."""
        if end.events - begin.events + end.life - begin.life > MAX_CATCH_UP_RECORDS:
            raise CursorExpired
        fed = self._bus.fed
        events = await self.read_window(events_stream(fed), stream_subjects(fed), begin.events, end.events)
        life = await self.read_window(
            lifecycle_stream(fed), [subjects.wildcard_for(fed, Transition)], begin.life, end.life
        )
        return sorted([*events, *life], key=lambda one: one.at)

    async def read_window(self, stream: str, wanted: list[str], after: int, until: int) -> list[FeedRecord]:
        """What *stream* holds between two sequences, the first one excluded."""
        found: list[FeedRecord] = []
        if until <= after:
            return found
        async with self._bus.watch(stream, wanted, after=after) as seen:
            with suppress(TimeoutError):
                while not found or found[-1].sequence < until:
                    found.append(to_record(await wait_within(END_OF_HISTORY_S, anext(seen))))
        return [one for one in found if one.sequence <= until]


async def _iter_records(seen: AsyncIterator[StoredMessage]) -> AsyncIterator[FeedRecord]:
    async for one in seen:
        yield to_record(one)


def _is_retained(one: FeedRecord) -> bool:
    return one.stream == LIFECYCLE or one.subject.rpartition(".")[2] in _RETAINED_NAMES


_RETAINED_NAMES: Final = frozenset(kind.word for kind in RETAINED_MESSAGES)
