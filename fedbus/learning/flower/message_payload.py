"""The content of a Flower message on its way: inside the event if it is small and without arrays, else a blob."""

from dataclasses import dataclass
from typing import Final

from fedbus.contracts.model import MAX_INLINE_BYTES
from fedbus.contracts.server import Content
from fedbus.learning.bus_protocol import Blobs, Offer
from fedbus.learning.flower.record_codec import Encoded, UnreadableRecords

SILENCE_S: Final = 30.0
"""For how long a blob may not come on by a single chunk: whoever holds it is gone then."""


@dataclass
class Parcel:
    """Encoded records, ready to go to any number of receivers. Made where time may pass: it hashes."""

    encoded: Encoded
    sha256: str | None
    """None where it goes inside the event."""

    @classmethod
    def of(cls, encoded: Encoded) -> "Parcel":
        inline = not encoded.has_arrays and encoded.size_bytes <= MAX_INLINE_BYTES
        return cls(encoded, None if inline else encoded.sha256())

    async def post(self, blobs: Blobs, *, receivers: int) -> tuple[Content, Offer | None]:
        """What to write into the events, and the offer to release once all have answered."""
        if self.sha256 is None:
            return Content(inline=self.encoded.joined()), None
        offer = await blobs.offer(self.encoded.buffers, receivers=receivers, sha256=self.sha256)
        return Content(blob=offer.ref), offer


async def received(content: Content | None, blobs: Blobs, *, timeout_s: float) -> bytes | memoryview:
    """The bytes of *content*, from wherever they are; raises UnreadableRecords and what fetching raises."""
    if content is not None and content.inline is not None:
        return content.inline
    if content is not None and content.blob is not None:
        return await blobs.fetch(content.blob, timeout_s=min(timeout_s, SILENCE_S))
    raise UnreadableRecords("there is neither content nor an error in it")
