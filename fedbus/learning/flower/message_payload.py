"""The content of a Flower message in transit: inline in the event if it is small and has no arrays, else a blob."""

from dataclasses import dataclass
from typing import Final

from fedbus.contracts.model import MAX_INLINE_BYTES
from fedbus.contracts.server import MessageContent
from fedbus.learning.bus_protocol import BlobsProtocol, OfferProtocol
from fedbus.learning.flower.record_codec import EncodedRecords, RecordDecodeError

IDLE_TIMEOUT_S: Final = 30.0
"""The limit of time without a chunk, after which the blob sender counts as lost."""


@dataclass
class MessagePayload:
    """Encoded records that can be sent to any number of receivers."""

    encoded: EncodedRecords
    sha256: str | None
    """None if the content is inline."""

    @classmethod
    def from_records(cls, encoded: EncodedRecords) -> "MessagePayload":
        """Choose inline or blob, and hash a blob: this blocks."""
        inline = not encoded.has_arrays and encoded.size_bytes <= MAX_INLINE_BYTES
        return cls(encoded, None if inline else encoded.sha256())

    async def prepare(
        self, blobs: BlobsProtocol, *, receivers: int
    ) -> tuple[MessageContent, OfferProtocol | None]:
        """Offer a blob to *receivers*. Returns the content of the event, and the offer to release after all replies."""
        if self.sha256 is None:
            return MessageContent(inline=self.encoded.to_bytes()), None
        offer = await blobs.offer(self.encoded.buffers, receivers=receivers, sha256=self.sha256)
        return MessageContent(blob=offer.ref), offer


async def fetch_content(
    content: MessageContent | None, blobs: BlobsProtocol, *, timeout_s: float
) -> bytes | memoryview:
    """Return the bytes of *content*, inline or from its blob. Raises the errors of `BlobsProtocol.fetch`.

    Raises:
        RecordDecodeError: *content* is None, or has neither inline bytes nor a blob.

    """
    if content is not None and content.inline is not None:
        return content.inline
    if content is not None and content.blob is not None:
        return await blobs.fetch(content.blob, timeout_s=min(timeout_s, IDLE_TIMEOUT_S))
    raise RecordDecodeError("the message has neither content nor an error")
