"""Queries on the past, read from the streams: a run, a trace, a single message and its causes."""

import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.agents.gateway.records import LIFECYCLE, FeedRecord, to_full_record, to_record, trace_id
from fedbus.bus.bus import Bus
from fedbus.bus.errors import FederationNotFound
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.client import ClientDeclined, ClientJoined, FailTrain, FinTrain, RoundReply
from fedbus.contracts.envelope import id_timestamp
from fedbus.contracts.identifiers import ID_PATTERN
from fedbus.contracts.run import RUN, RunData
from fedbus.contracts.transition import Transition

MAX_MESSAGES_READ: Final = 50_000
"""Maximum number of messages of a stream that one query reads."""
END_OF_HISTORY_S: Final = 1.0
AFTER_RUN: Final = timedelta(seconds=60)
"""Time after the end of a run in which its clients still load its model."""
TICK: Final = timedelta(milliseconds=1)
"""Envelope times have a resolution of one millisecond; body times are finer."""
MAX_DELAY: Final = timedelta(minutes=10)
"""Maximum delay of messages that a disconnected device publishes later."""
MAX_MESSAGES_PER_STEP: Final = 10_000
"""Maximum number of messages that are read to find one cause."""
MAX_CHAIN_LENGTH: Final = 500
MAX_CLOCK_SKEW: Final = timedelta(seconds=3)
"""Assumed maximum difference between the clocks of two machines."""
ENTITY_KINDS: Final = frozenset({"client", "fl_client", "inference", "server", "run"})


class StreamHistory:
    """Bounded queries on the events and lifecycle streams."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def read_run(self, run: str) -> list[FeedRecord] | None:
        """Return the transitions and reports from the request of *run* until AFTER_RUN after its end, in order.

        The result is None if the lifecycle stream does not contain the run.
        """
        if not re.fullmatch(ID_PATTERN, run):
            return None
        last = await self._bus.last_on_subject(subjects.lifecycle(self._bus.fed, RUN.kind, run))
        if last is None or not isinstance(last.message, Transition):
            return None
        run_data = last.message.facts
        assert isinstance(run_data, RunData)
        is_final = last.message.target in RUN.final
        until = last.envelope.time + AFTER_RUN if is_final else None
        task = run_data.task

        def belongs(stored: StoredMessage) -> bool:
            message = stored.message
            if message.task != task:
                return False
            if isinstance(message, Transition):
                return message.kind in ENTITY_KINDS
            return getattr(message, "run", None) == run

        begin = run_data.requested_at - TICK
        life = await self._read(self._lifecycle_source, begin, until, belongs)
        kinds = (RoundReply, ClientJoined, ClientDeclined, FinTrain, FailTrain)
        filters = [subjects.wildcard_for(self._bus.fed, kind, task=task) for kind in kinds]
        events = await self._read((events_stream(self._bus.fed), filters), begin, until, belongs)
        return sorted([*life, *events], key=lambda record: record.at)

    async def read_trace(self, trace: str, since: datetime | None) -> list[FeedRecord]:
        """Return the messages of a trace since *since*, in order; an empty list if *since* is None."""
        if since is None:
            return []
        until = since + timedelta(hours=2)

        def belongs(stored: StoredMessage) -> bool:
            return trace_id(stored.envelope.trace.get("traceparent", "")) == trace

        events = (events_stream(self._bus.fed), [subjects.federation_wildcard(self._bus.fed)])
        parts = [
            await self._read(stream, since, until, belongs) for stream in (events, self._lifecycle_source)
        ]
        return sorted([record for part in parts for record in part], key=lambda record: record.at)

    async def read_message(self, stream: str, sequence: int) -> FeedRecord | None:
        """Return one message without truncation, or None if the stream does not contain it."""
        fed = self._bus.fed
        name, filters = (
            self._lifecycle_source if stream == LIFECYCLE else (events_stream(fed), stream_subjects(fed))
        )
        with suppress(TimeoutError, FederationNotFound):
            async with self._bus.read_stream(name, filters, after=sequence - 1) as messages:
                stored = await wait_within(END_OF_HISTORY_S, anext(messages))
                return to_full_record(stored) if stored.sequence == sequence else None
        return None

    async def read_causes(self, stream: str, sequence: int) -> tuple[list[FeedRecord], bool] | None:
        """Return the chain of causes of a message, root cause first, and whether the chain is complete.

        The chain is incomplete if the streams no longer contain a cause, or if MAX_CHAIN_LENGTH or
        MAX_MESSAGES_READ is reached. The result is None if the stream does not contain the message.
        """
        effect = await self.read_message(stream, sequence)
        if effect is None:
            return None
        chain, by_id, budget = [effect], {effect.id: effect}, MAX_MESSAGES_READ
        while (cause := chain[-1].cause) and len(chain) < MAX_CHAIN_LENGTH and budget > 0:
            if cause not in by_id:
                records = await self._read_around(cause, min(budget, MAX_MESSAGES_PER_STEP))
                by_id |= {record.id: record for record in records}
                budget -= len(records)
            if cause not in by_id or by_id[cause] in chain:
                break
            chain.append(by_id[cause])
        return chain[::-1], not chain[-1].cause

    async def _read_around(self, id: str, limit: int) -> list[FeedRecord]:
        """Read up to *limit* messages published at about the time of message *id*, up to the message itself.

        The time comes from the id, a UUIDv7.
        """
        published_at = id_timestamp(id)
        records: list[FeedRecord] = []
        if published_at is None:
            return records
        for name, filters in (
            self._lifecycle_source,
            (events_stream(self._bus.fed), stream_subjects(self._bus.fed)),
        ):
            _, last = await self._bus.sequence_range(name)
            async with self._bus.read_stream(name, filters, since=published_at - MAX_CLOCK_SKEW) as messages:
                with suppress(TimeoutError):
                    for _ in range(limit // 2 if last else 0):
                        record = to_record(await wait_within(END_OF_HISTORY_S, anext(messages)))
                        records.append(record)
                        if record.id == id:
                            return records
                        if record.sequence >= last or record.at > published_at + MAX_DELAY:
                            break
        return records

    @property
    def _lifecycle_source(self) -> tuple[str, list[str]]:
        return lifecycle_stream(self._bus.fed), [subjects.wildcard_for(self._bus.fed, Transition)]

    async def _read(
        self,
        stream: tuple[str, list[str]],
        since: datetime,
        until: datetime | None,
        belongs: Callable[[StoredMessage], bool],
    ) -> list[FeedRecord]:
        name, filters = stream
        _, last = await self._bus.sequence_range(name)
        records: list[FeedRecord] = []
        async with self._bus.read_stream(name, filters, since=since) as messages:
            with suppress(TimeoutError):
                for _ in range(MAX_MESSAGES_READ):
                    stored = await wait_within(END_OF_HISTORY_S, anext(messages))
                    at = stored.envelope.time
                    if since <= at and (until is None or at <= until) and belongs(stored):
                        records.append(to_record(stored))
                    if until is not None and at > until + MAX_DELAY:
                        break
                    if stored.sequence >= last:
                        break
        return records
