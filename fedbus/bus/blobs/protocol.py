"""The protocol of blob transfers.

    fedbus.<fed>.blob.<holder>.ask.<asker>            ChunkRequest; the reply subject is where the chunks go
    fedbus.<fed>.blob.<receiver>.in.<fetch>.<index>   a chunk: only its bytes
    fedbus.<fed>.blob.<receiver>.in.<fetch>.here      ProbeReply: everything requested before has been sent
    fedbus.<fed>.blob.<receiver>.in.<fetch>.no        the blob is unavailable, with the reason
    fedbus.<fed>.blob.<receiver>.in.<fetch>.cast      an invitation to a multicast
    fedbus.<fed>.blob.<holder>.cast.<cast>.<index>    a chunk for a whole cohort

A ChunkRequest also grants credit: the sender sends what is requested, and nothing else. If nothing arrives, a probe
distinguishes a slow connection from a loss: its reply follows every chunk that was sent before, so a chunk that has
not arrived by then is lost, and is requested again. The index is the last token of the subject, so a chunk needs no
header and no prefix, and its bytes are not copied. A receiver subscribes to a multicast only after its invitation,
so a receiver that was dropped gets no more of its chunks.

A holder is an owner and a name, ``c1.trainer_0123``, and an asker is an owner. So NATS permissions can prevent
requests in the name of another owner, and the sender can prevent chunks from being sent to another owner.
"""

import re
import struct
from dataclasses import dataclass
from typing import Final

from fedbus.contracts import subjects
from fedbus.contracts.identifiers import FederationId

CHUNK_BYTES: Final = 2 * 1024**2
"""Measured: see `benchmarks/blobs.py`. A receiver needs memory for at least one chunk."""
WINDOW_BYTES: Final = 8 * 1024**2
"""Bytes of one fetch in flight: requested, and not yet written to the sink."""
SHARED_WINDOW_BYTES: Final = 64 * 1024**2
"""Bytes in flight for all fetches of a process together, if each still has one chunk."""
MAX_REQUEST_CHUNKS: Final = 4096
"""Chunks that a sender queues for one fetch, at most."""

PROBE_REPLY: Final = "here"
UNAVAILABLE: Final = "no"
MULTICAST: Final = "cast"

_CHUNK_REQUEST: Final = struct.Struct(">32sIIQI")
_PROBE_REPLY: Final = struct.Struct(">II")


@dataclass(frozen=True)
class ChunkRequest:
    """A request for the chunks from *first* up to, not including, *until*.

    *multicast* is the number of the multicast that the receiver takes part in; 0: none. A *probe* other than 0 requests
    a `ProbeReply` after these chunks.
    """

    sha256: str
    first: int
    until: int
    multicast: int = 0
    probe: int = 0

    def pack(self) -> bytes:
        return _CHUNK_REQUEST.pack(
            bytes.fromhex(self.sha256), self.first, self.until, self.multicast, self.probe
        )

    def clip_to(self, chunks: int) -> range:
        """Return the requested range of a blob with *chunks* chunks, limited to `MAX_REQUEST_CHUNKS`."""
        return range(self.first, min(self.until, chunks, self.first + MAX_REQUEST_CHUNKS))

    @classmethod
    def unpack(cls, packed: bytes) -> "ChunkRequest | None":
        """Decode a request; None if *packed* is invalid."""
        if len(packed) != _CHUNK_REQUEST.size:
            return None
        digest, *numbers = _CHUNK_REQUEST.unpack(packed)
        return cls(digest.hex(), *numbers)


@dataclass(frozen=True)
class ProbeReply:
    """The reply to *probe*: every chunk below *until* that was requested before the probe has been sent."""

    probe: int
    until: int

    def pack(self) -> bytes:
        return _PROBE_REPLY.pack(self.probe, self.until)

    @classmethod
    def unpack(cls, packed: bytes) -> "ProbeReply | None":
        """Decode a reply; None if *packed* is invalid."""
        return cls(*_PROBE_REPLY.unpack(packed)) if len(packed) == _PROBE_REPLY.size else None


def request_subject(fed: FederationId, holder: str, asker: str = "*") -> str:
    """Return the subject for requests to *holder*, from one *asker* or from all."""
    return subjects.blob(fed, holder, f"ask.{asker}")


def owner_of(holder: str) -> str:
    """Return the owner of the process *holder*: a client, or the server side."""
    return holder.partition(".")[0]


def inbox_subject(fed: FederationId, receiver: str, fetch: str) -> str:
    """Return the subject for the chunks of one *fetch*, without the index."""
    return subjects.blob(fed, receiver, f"in.{fetch}")


def multicast_subject(fed: FederationId, holder: str, number: int) -> str:
    """Return the subject for the chunks of one multicast, without the index."""
    return subjects.blob(fed, holder, f"cast.{number}")


def is_inbox_of(fed: FederationId, place: str, asker: str) -> bool:
    """Return whether *place* is an inbox of *asker*; a sender sends to no other subject."""
    root = re.escape(subjects.blob(fed, asker, ""))
    return re.fullmatch(rf"{root}([A-Za-z0-9_-]+\.)?in\.[A-Za-z0-9_-]+", place) is not None
