"""What the two sides of a transfer say to each other.

    fedbus.<fed>.blob.<holder>.ask.<asker>            Ask; the reply subject says where to put the chunks
    fedbus.<fed>.blob.<receiver>.in.<fetch>.<index>   a chunk, and nothing but its bytes
    fedbus.<fed>.blob.<receiver>.in.<fetch>.here      Here: what has been sent before this answer to a probe
    fedbus.<fed>.blob.<receiver>.in.<fetch>.no        why there will be nothing
    fedbus.<fed>.blob.<receiver>.in.<fetch>.cast      a cast to listen to instead
    fedbus.<fed>.blob.<holder>.cast.<cast>.<index>    a chunk for a whole cohort

An Ask is a grant of credit as well: the holder sends what is asked for, and nothing else. Where
nothing comes, a probe tells a slow way from a loss: its answer comes behind every chunk that was
sent before, so what has not come by then never will, and is asked for again. The index is the
last token of the subject, so a chunk needs no header and no prefix, and its bytes go from the
wire to their place untouched. Nobody subscribes to a cast before being told of it, so whoever
falls out of one is left behind with nothing on its way to it.

A holder is an owner and a name, ``c1.trainer_0123``, and an asker is an owner: so the broker can
see to it that nobody asks in another's name, and the holder that nobody has chunks sent to another.
"""

import re
import struct
from dataclasses import dataclass
from typing import Final

from fedbus.contracts import subjects
from fedbus.contracts.identifiers import FederationId

CHUNK_BYTES: Final = 2 * 1024**2
"""Measured: see `benchmarks/blobs.py`. A chunk is also the least that a receiver must be able to hold."""
WINDOW_BYTES: Final = 8 * 1024**2
"""What one fetch has in flight: asked for, and not yet in its place."""
SHARED_WINDOW_BYTES: Final = 64 * 1024**2
"""What all fetches of a process have in flight together, as long as each has a chunk."""
MAX_REQUEST_CHUNKS: Final = 4096
"""The most that a holder remembers for one fetch."""

PROBE_REPLY: Final = "here"
UNAVAILABLE: Final = "no"
MULTICAST: Final = "cast"

_CHUNK_REQUEST: Final = struct.Struct(">32sIIQI")
_PROBE_REPLY: Final = struct.Struct(">II")


@dataclass(frozen=True)
class ChunkRequest:
    """Send me the chunks from *first* up to, not including, *until*; by *cast*, if I am in one.
    With a *probe*, say so when all has been sent.
    """

    sha256: str
    first: int
    until: int
    cast: int = 0
    probe: int = 0

    def pack(self) -> bytes:
        return _CHUNK_REQUEST.pack(bytes.fromhex(self.sha256), self.first, self.until, self.cast, self.probe)

    def within(self, chunks: int) -> range:
        """What of a blob of so many chunks is asked for, as far as a holder remembers it."""
        return range(self.first, min(self.until, chunks, self.first + MAX_REQUEST_CHUNKS))

    @classmethod
    def unpack(cls, packed: bytes) -> "ChunkRequest | None":
        """The Ask in *packed*, or None where there is none."""
        if len(packed) != _CHUNK_REQUEST.size:
            return None
        digest, *numbers = _CHUNK_REQUEST.unpack(packed)
        return cls(digest.hex(), *numbers)


@dataclass(frozen=True)
class ProbeReply:
    """What was asked for before the *probe* has been sent, as far as it lies below *until*."""

    probe: int
    until: int

    def pack(self) -> bytes:
        return _PROBE_REPLY.pack(self.probe, self.until)

    @classmethod
    def unpack(cls, packed: bytes) -> "ProbeReply | None":
        """The Here in *packed*, or None where there is none."""
        return cls(*_PROBE_REPLY.unpack(packed)) if len(packed) == _PROBE_REPLY.size else None


def request_subject(fed: FederationId, holder: str, asker: str = "*") -> str:
    """Where *holder* is asked: by anybody, or by one *asker*."""
    return subjects.blob(fed, holder, f"ask.{asker}")


def owner_of(holder: str) -> str:
    """Whose process *holder* is: a client's, or the server side's."""
    return holder.partition(".")[0]


def inbox_subject(fed: FederationId, receiver: str, fetch: str) -> str:
    """Where the chunks of one *fetch* go, less the index."""
    return subjects.blob(fed, receiver, f"in.{fetch}")


def multicast_subject(fed: FederationId, holder: str, number: int) -> str:
    """Where the chunks of one cast go, less the index."""
    return subjects.blob(fed, holder, f"cast.{number}")


def is_inbox_of(fed: FederationId, place: str, asker: str) -> bool:
    """Whether *place* is one of the *asker*'s own: a holder sends nowhere else, whoever asks."""
    root = re.escape(subjects.blob(fed, asker, ""))
    return re.fullmatch(rf"{root}([A-Za-z0-9_-]+\.)?in\.[A-Za-z0-9_-]+", place) is not None
