"""The past, read from the streams for whoever asks: a run, a trace, a single message."""

import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.agents.gateway.records import LIFECYCLE, FeedRecord, to_full_record, to_record, trace_id
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.errors import FederationNotFound
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.client import ClientDeclined, ClientJoined, FailTrain, FinTrain, RoundReply
from fedbus.contracts.envelope import id_timestamp
from fedbus.contracts.identifiers import ID_PATTERN
from fedbus.contracts.run import RUN, RunData
from fedbus.contracts.transition import Transition

MAX_MESSAGES_READ: Final = 50_000
"""How many messages of a stream one question may read."""
END_OF_HISTORY_S: Final = 1.0
AFTER_RUN: Final = timedelta(seconds=60)
"""So long after a run its clients are still putting its model to use."""
TICK: Final = timedelta(milliseconds=1)
"""Envelopes have times of whole milliseconds, bodies finer ones."""
MAX_DELAY: Final = timedelta(minutes=10)
"""What was said while its device was cut off may come so much later."""
MAX_MESSAGES_PER_STEP: Final = 10_000
"""How many messages are read for one step back, at most."""
MAX_CHAIN_LENGTH: Final = 500
MAX_CLOCK_SKEW: Final = timedelta(seconds=3)
"""By so much two machines' clocks may differ."""
ENTITY_KINDS: Final = frozenset({"client", "fl_client", "inference", "server", "run"})


class StreamHistory:
    """Answers out of what the streams hold; bounded, so that no question costs more than a moment."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def of_run(self, run: str) -> list[FeedRecord] | None:
        """What moved and what was reported from the request of *run* to a little after its end, in order."""
        if not re.fullmatch(ID_PATTERN, run):
            return None
        seen = await self._bus.last(subjects.lifecycle(self._bus.fed, RUN.kind, run))
        if seen is None or not isinstance(seen.message, Transition):
            return None
        facts = seen.message.facts
        assert isinstance(facts, RunData)
        over = seen.message.target in RUN.final
        until = seen.envelope.time + AFTER_RUN if over else None
        task = facts.task

        def belongs(one: StoredMessage) -> bool:
            moves = isinstance(one.message, Transition)
            return one.message.task == task and (
                (isinstance(one.message, Transition) and one.message.kind in ENTITY_KINDS)
                or (not moves and getattr(one.message, "run", None) == run)
            )

        begin = facts.requested_at - TICK
        life = await self._read(self._life, begin, until, belongs)
        kinds = (RoundReply, ClientJoined, ClientDeclined, FinTrain, FailTrain)
        words = [subjects.wildcard_for(self._bus.fed, kind, task=task) for kind in kinds]
        said = await self._read((events_stream(self._bus.fed), words), begin, until, belongs)
        return sorted([*life, *said], key=lambda one: one.at)

    async def of_trace(self, trace: str, since: datetime | None) -> list[FeedRecord]:
        """All messages of a trace from *since* on, in order; nothing where that is not known."""
        if since is None:
            return []
        until = since + timedelta(hours=2)

        def belongs(one: StoredMessage) -> bool:
            return trace_id(one.envelope.trace.get("traceparent", "")) == trace

        events = (events_stream(self._bus.fed), [subjects.federation_wildcard(self._bus.fed)])
        found = [await self._read(stream, since, until, belongs) for stream in (events, self._life)]
        return sorted([one for part in found for one in part], key=lambda one: one.at)

    async def message(self, stream: str, sequence: int) -> FeedRecord | None:
        """One message, uncut; None where the stream does not hold it."""
        fed = self._bus.fed
        name, wanted = self._life if stream == LIFECYCLE else (events_stream(fed), stream_subjects(fed))
        with suppress(TimeoutError, FederationNotFound):
            async with self._bus.watch(name, wanted, after=sequence - 1) as seen:
                one = await wait_within(END_OF_HISTORY_S, anext(seen))
                return to_full_record(one) if one.sequence == sequence else None
        return None

    async def causes(self, stream: str, sequence: int) -> tuple[list[FeedRecord], bool] | None:
        """What led to a message, from what began it all to the message itself; whether that is all of it.

        Not all where the streams no longer hold the one before, or where that is more than `LONGEST_CHAIN` or
        `LOOKED_AT` allow. None where the stream does not hold the message.
        """
        effect = await self.message(stream, sequence)
        if effect is None:
            return None
        chain, known, left = [effect], {effect.id: effect}, MAX_MESSAGES_READ
        while (cause := chain[-1].cause) and len(chain) < MAX_CHAIN_LENGTH and left > 0:
            if cause not in known:
                found = await self._around(cause, min(left, MAX_MESSAGES_PER_STEP))
                known |= {one.id: one for one in found}
                left -= len(found)
            if cause not in known or known[cause] in chain:
                break
            chain.append(known[cause])
        return chain[::-1], not chain[-1].cause

    async def _around(self, id: str, most: int) -> list[FeedRecord]:
        """What was said a little before message *id* up to it: its id tells when. At most *most* messages."""
        said = id_timestamp(id)
        found: list[FeedRecord] = []
        if said is None:
            return found
        for name, wanted in (self._life, (events_stream(self._bus.fed), stream_subjects(self._bus.fed))):
            _, last = await self._bus.sequence_range(name)
            async with self._bus.watch(name, wanted, since=said - MAX_CLOCK_SKEW) as seen:
                with suppress(TimeoutError):
                    for _ in range(most // 2 if last else 0):
                        one = to_record(await wait_within(END_OF_HISTORY_S, anext(seen)))
                        found.append(one)
                        if one.id == id:
                            return found
                        if one.sequence >= last or one.at > said + MAX_DELAY:
                            break
        return found

    @property
    def _life(self) -> tuple[str, list[str]]:
        return lifecycle_stream(self._bus.fed), [subjects.wildcard_for(self._bus.fed, Transition)]

    async def _read(
        self,
        stream: tuple[str, list[str]],
        since: datetime,
        until: datetime | None,
        belongs: Callable[[StoredMessage], bool],
    ) -> list[FeedRecord]:
        name, wanted = stream
        _, last = await self._bus.sequence_range(name)
        found: list[FeedRecord] = []
        async with self._bus.watch(name, wanted, since=since) as seen:
            with suppress(TimeoutError):
                for _ in range(MAX_MESSAGES_READ):
                    one = await wait_within(END_OF_HISTORY_S, anext(seen))
                    at = one.envelope.time
                    if since <= at and (until is None or at <= until) and belongs(one):
                        found.append(to_record(one))
                    if until is not None and at > until + MAX_DELAY:
                        break
                    if one.sequence >= last:
                        break
        return found
