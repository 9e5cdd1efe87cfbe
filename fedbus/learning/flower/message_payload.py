"""The content of a Flower message on its way: inside the event if it is small and without arrays, else a blob."""

from dataclasses import dataclass
from typing import Final

from fedbus.contracts.model import MAX_INLINE_BYTES
from fedbus.contracts.server import MessageContent
from fedbus.learning.bus_protocol import BlobsProtocol, OfferProtocol
from fedbus.learning.flower.record_codec import EncodedRecords, RecordDecodeError

IDLE_TIMEOUT_S: Final = 30.0
"""For how long a blob may not come on by a single chunk: whoever holds it is gone then."""


@dataclass
class MessagePayload:
    """Encoded records, ready to go to any number of receivers. Made where time may pass: it hashes."""

    encoded: EncodedRecords
    sha256: str | None
    """None where it goes inside the event."""

    @classmethod
    def of(cls, encoded: EncodedRecords) -> "MessagePayload":
        inline = not encoded.has_arrays and encoded.size_bytes <= MAX_INLINE_BYTES
        return cls(encoded, None if inline else encoded.sha256())

    async def post(
        self, blobs: BlobsProtocol, *, receivers: int
    ) -> tuple[MessageContent, OfferProtocol | None]:
        """What to write into the events, and the offer to release once all have answered."""
        if self.sha256 is None:
            return MessageContent(inline=self.encoded.joined()), None
        offer = await blobs.offer(self.encoded.buffers, receivers=receivers, sha256=self.sha256)
        return MessageContent(blob=offer.ref), offer


async def fetch_content(
    content: MessageContent | None, blobs: BlobsProtocol, *, timeout_s: float
) -> bytes | memoryview:
    """The bytes of *content*, from wherever they are; raises UnreadableRecords and what fetching raises."""
    if content is not None and content.inline is not None:
        return content.inline
    if content is not None and content.blob is not None:
        return await blobs.fetch(content.blob, timeout_s=min(timeout_s, IDLE_TIMEOUT_S))
    raise RecordDecodeError("there is neither content nor an error in it")
