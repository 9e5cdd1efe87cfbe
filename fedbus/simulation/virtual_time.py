"""The virtual clock of a simulation with a profile: when each reply arrives, and in which order. No I/O.

The time of a reply is known when a worker has computed it. Until then, a lower bound is known. So the next event is
certain as soon as no reply that is not computed can arrive before it:

    sent ──▶ computed by a worker ──▶ arrives at its virtual time, or the limit of the message passes
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Final

from fedbus.simulation.profiles.conditions import Conditions

FOREVER: Final = math.inf


@dataclass(slots=True)
class _Transit:
    """A message and its reply, on their way."""

    number: int
    client: str
    kind: str
    message: int
    """The number of the message among those to this client."""
    sent_at: float
    deadline: float
    download_bytes: int
    is_certain: bool = False
    """Whether the time of the reply is known."""
    arrives_at: float = FOREVER


@dataclass(frozen=True, slots=True)
class TransitEnd:
    """The reply to message *number* arrives at *time*, or there is none until *time*."""

    number: int
    time: float
    has_arrived: bool


@dataclass(order=True, slots=True)
class _Entry:
    time: float
    number: int
    is_certain: bool = field(compare=False)


class VirtualTime:
    """The clock, and the messages on their way under *conditions*."""

    def __init__(self, conditions: Conditions, clients: Sequence[str]) -> None:
        self.now = 0.0
        self._conditions = conditions
        self._clients = list(clients)
        self._transits: dict[int, _Transit] = {}
        self._heap: list[_Entry] = []
        self._message_counts: Counter[str] = Counter()
        self._free_at: dict[str, float] = {}
        self._present: list[str] = []
        self._is_present = [False] * len(self._clients)
        self._presence_changes = [(-1.0, index) for index in range(len(self._clients))]
        """A heap: when the presence of a client changes next, and its index. All are due at the start."""

    # --- clients ------------------------------------------------------------------------------

    def present(self) -> list[str]:
        """Return the clients that are available now."""
        changes, now, is_changed = self._presence_changes, self.now, False
        while changes and changes[0][0] <= now:
            index = changes[0][1]
            client = self._clients[index]
            is_present = self._conditions.is_available(client, now)
            is_changed |= is_present != self._is_present[index]
            self._is_present[index] = is_present
            heapq.heapreplace(changes, (self._conditions.next_availability_change(client, now), index))
        if is_changed:
            self._present = list(compress(self._clients, self._is_present))
        return self._present

    def next_presence_change(self) -> float:
        """Return the next time at which `present` may change; infinity if it never does."""
        self.present()
        return self._presence_changes[0][0] if self._presence_changes else FOREVER

    # --- messages -----------------------------------------------------------------------------

    def send(self, number: int, client: str, kind: str, *, download_bytes: int, limit_s: float) -> bool:
        """Send a message now. Return whether the client receives it, so that a worker has to compute the reply."""
        count = self._message_counts[client]
        self._message_counts[client] += 1
        transit = _Transit(number, client, kind, count, self.now, self.now + limit_s, download_bytes)
        self._transits[number] = transit
        is_received = self._conditions.receives(client, count)
        if is_received:
            bound = self._conditions.earliest_arrival(
                client,
                count,
                sent_at=self.now,
                kind=kind,
                download_bytes=download_bytes,
                free_at=self._free_at.get(client, 0.0),
            )
        else:
            transit.is_certain, bound = True, FOREVER
        self._push(transit, bound)
        return is_received

    def compute(self, number: int, *, train_s: float, upload_bytes: int, samples: int = 0) -> float:
        """Record that a worker has computed the reply to message *number*, with the measured training time.

        Return the training time on the client's device.
        """
        transit = self._transits.get(number)
        if transit is None or transit.is_certain:
            return train_s
        arrival = self._conditions.exchange(
            transit.client,
            transit.message,
            sent_at=transit.sent_at,
            kind=transit.kind,
            download_bytes=transit.download_bytes,
            upload_bytes=upload_bytes,
            train_s=train_s,
            samples=samples,
            free_at=self._free_at.get(transit.client, 0.0),
        )
        self._free_at[transit.client] = arrival.free_at
        transit.is_certain, transit.arrives_at = True, arrival.at
        self._push(transit, arrival.at)
        return arrival.train_s

    # --- time ---------------------------------------------------------------------------------

    def advance(self, until: float) -> TransitEnd | None:
        """Move the clock to the next event, at most to *until*, and return the event.

        None: the clock is at *until*, or the next event depends on replies that are not computed. Then the clock has
        not moved, and is before *until*.
        """
        entry = self._peek()
        if entry is None or entry.time > until:
            if not math.isinf(until):
                self.now = max(self.now, until)
            return None
        if not entry.is_certain:
            return None
        heapq.heappop(self._heap)
        transit = self._transits.pop(entry.number)
        self.now = max(self.now, entry.time)
        return TransitEnd(entry.number, entry.time, has_arrived=transit.arrives_at <= transit.deadline)

    @property
    def waits_for_workers(self) -> bool:
        """Whether the next event depends on replies that are not computed."""
        entry = self._peek()
        return entry is not None and not entry.is_certain

    def _push(self, transit: _Transit, time: float) -> None:
        """Add the time of *transit*, or its limit.

        A limit that is certain to pass waits for the worker, too: the message makes its client busy and changes its
        state, and the clock must not depend on which messages a worker has already.
        """
        entry = _Entry(min(time, transit.deadline), transit.number, transit.is_certain)
        heapq.heappush(self._heap, entry)

    def _peek(self) -> _Entry | None:
        """Return the first entry that still counts."""
        while self._heap:
            entry = self._heap[0]
            transit = self._transits.get(entry.number)
            if transit is not None and entry.is_certain >= transit.is_certain:
                return entry
            heapq.heappop(self._heap)
        return None
