"""The flow control of a multicast: one blob, sent once, to a whole cohort. Decisions only; no I/O, no clock.

A multicast gathers first: every receiver that requests the blob is invited. It starts when all expected receivers
have accepted, or after a timeout from the first request with those that have. It sends only the chunks that the
slowest receiver has requested. A receiver that delays it for too long is dropped and fetches the rest by unicast;
the others gather again under a new number, to which the dropped receiver does not subscribe.
"""

from collections.abc import Mapping
from enum import StrEnum

from fedbus.common import clock


class MulticastPhase(StrEnum):
    GATHERING = "gathering"
    SENDING = "casting"
    DONE = "over"


class MulticastState:
    def __init__(self, *, chunks: int, receivers: int) -> None:
        self._chunks = chunks
        self._expected = receivers
        self._invited: dict[str, range] = {}
        self._credit: dict[str, int] = {}
        self.phase = MulticastPhase.GATHERING
        self.number = _random_number()
        self.position = 0
        """The next chunk to send."""

    @property
    def has_all_receivers(self) -> bool:
        return len(self._credit) >= self._expected

    @property
    def is_blocked(self) -> bool:
        """True if a receiver has not requested the next chunk yet."""
        return self.phase is MulticastPhase.SENDING and min(self._credit.values()) <= self.position

    def covers(self, place: str) -> bool:
        """Return whether this multicast serves the receiver at *place*; the chunks below `position` are sent."""
        return place in self._invited

    def invite(self, place: str, chunks: range) -> bool:
        """Decide whether a unicast request from *place* is answered by an invitation to this multicast."""
        if self.phase is not MulticastPhase.GATHERING or len(self._invited.keys() | {place}) > self._expected:
            return False
        if (
            chunks or place not in self._invited
        ):  # a probe requests no chunks, and must not reset those requested
            self._invited[place] = chunks
        return True

    def grant_credit(self, place: str, number: int, until: int) -> bool:
        """Record that the receiver at *place* can take the chunks below *until*.

        Returns:
            False if it does not take part: it accepted too late, or was dropped.

        """
        if number != self.number or place not in self._invited:
            return False
        self._credit[place] = max(until, self._credit.get(place, 0))
        return True

    def start(self) -> Mapping[str, range]:
        """Start sending. Return the invited receivers that have not accepted, with the chunks that each requested."""
        missing = {place: chunks for place, chunks in self._invited.items() if place not in self._credit}
        for place in missing:
            del self._invited[place]
        self.phase = MulticastPhase.SENDING if self._credit else MulticastPhase.DONE
        return missing

    def next_chunk(self) -> int | None:
        """Return the chunk to send now; None if some receiver has not requested the next one."""
        if self.phase is not MulticastPhase.SENDING or self.is_blocked:
            return None
        chunk, self.position = self.position, self.position + 1
        if self.position == self._chunks:
            self.phase = MulticastPhase.DONE
        return chunk

    def drop_slow_receivers(self) -> frozenset[str]:
        """Gather again without the receivers that delay the multicast. Return the remaining ones, to be invited."""
        self._invited = {
            place: range(self.position, until)
            for place, until in self._credit.items()
            if until > self.position
        }
        self._credit = {}
        self._expected = len(self._invited)
        self.number = _random_number()
        self.phase = MulticastPhase.GATHERING if self._invited else MulticastPhase.DONE
        return frozenset(self._invited)


def _random_number() -> int:
    """Return a random number, never 0: in a ChunkRequest, 0 means unicast."""
    return clock.random_bits(62) + 1
