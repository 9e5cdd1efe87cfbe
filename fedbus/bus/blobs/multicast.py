"""The pace of a cast: one blob, sent once, to all of a cohort. Decisions only; no I/O, no clock.

A cast gathers: everyone who asks is invited. It begins when all who are expected have accepted,
or some patience after the first asked, with those who have. From then on it goes as far as
its slowest listener has asked. One who holds it up for too long falls out, and fetches
the rest alone; the others gather again under another number, which he does not hear.
"""

import secrets
from collections.abc import Mapping
from enum import StrEnum


class MulticastPhase(StrEnum):
    GATHERING = "gathering"
    CASTING = "casting"
    OVER = "over"


class MulticastState:
    def __init__(self, *, chunks: int, receivers: int) -> None:
        self._chunks = chunks
        self._expected = receivers
        self._invited: dict[str, range] = {}
        self._credit: dict[str, int] = {}
        self.phase = MulticastPhase.GATHERING
        self.number = _random_number()
        self.position = 0
        """The chunk that is cast next."""

    @property
    def all_here(self) -> bool:
        return len(self._credit) >= self._expected

    @property
    def held_up(self) -> bool:
        """Whether a listener has not asked for the next chunk yet."""
        return self.phase is MulticastPhase.CASTING and min(self._credit.values()) <= self.position

    def covers(self, place: str) -> bool:
        """Whether *place* is sent what it asks for by this cast: by now, the chunks below `position`."""
        return place in self._invited

    def invite(self, place: str, asked: range) -> bool:
        """Whether whoever asks at *place*, outside of the cast, is to listen to it instead of being answered."""
        if self.phase is not MulticastPhase.GATHERING or len(self._invited.keys() | {place}) > self._expected:
            return False
        if asked or place not in self._invited:  # a probe asks for nothing, and takes nothing back
            self._invited[place] = asked
        return True

    def grant(self, place: str, number: int, until: int) -> bool:
        """The listener at *place* can take the chunks below *until*. False where it is no listener:
        it has accepted too late, or has fallen out.
        """
        if number != self.number or place not in self._invited:
            return False
        self._credit[place] = max(until, self._credit.get(place, 0))
        return True

    def begin(self) -> Mapping[str, range]:
        """Enough waited. Returns who was invited and is not here, with what each is still owed."""
        left_behind = {place: asked for place, asked in self._invited.items() if place not in self._credit}
        for place in left_behind:
            del self._invited[place]
        self.phase = MulticastPhase.CASTING if self._credit else MulticastPhase.OVER
        return left_behind

    def next_chunk(self) -> int | None:
        """The chunk to send now, if there is one that every listener has asked for."""
        if self.phase is not MulticastPhase.CASTING or self.held_up:
            return None
        chunk, self.position = self.position, self.position + 1
        if self.position == self._chunks:
            self.phase = MulticastPhase.OVER
        return chunk

    def drop_laggards(self) -> frozenset[str]:
        """Gather again without those who hold it up. Returns who is left, to be invited."""
        self._invited = {
            place: range(self.position, until)
            for place, until in self._credit.items()
            if until > self.position
        }
        self._credit = {}
        self._expected = len(self._invited)
        self.number = _random_number()
        self.phase = MulticastPhase.GATHERING if self._invited else MulticastPhase.OVER
        return frozenset(self._invited)


def _random_number() -> int:
    """Never 0, which in an Ask says: in no cast."""
    return secrets.randbits(62) + 1
