"""The content of a message in transit: inline in the event if it is small, else a blob."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from fedbus.contracts.model import MAX_INLINE_BYTES
from fedbus.contracts.round_messages import MessageContent
from fedbus.learning.bus_protocol import BlobsProtocol, OfferProtocol

IDLE_TIMEOUT_S: Final = 30.0
"""The limit of time without a chunk, after which the blob sender counts as lost."""


class ContentMissing(ValueError):
    """A message has neither content nor an error."""


@dataclass(frozen=True, eq=False)
class Payload:
    """Consecutive buffers that can be sent to any number of receivers. They must not change until they are sent."""

    buffers: list[memoryview]
    is_inline: bool

    @classmethod
    def pack(cls, buffers: Iterable[bytes | bytearray | memoryview], *, as_blob: bool = False) -> "Payload":
        """Choose inline or blob. With *as_blob*, which suits weights of any size, it is always a blob.

        Nothing is copied.
        """
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        return cls(views, not as_blob and sum(len(view) for view in views) <= MAX_INLINE_BYTES)

    @cached_property
    def sha256(self) -> str | None:
        """The digest of a blob, computed at the first access, which blocks; None if the content is inline.

        Access it before `prepare`, in a thread that is not the event loop's.
        """
        return None if self.is_inline else _digest(self.buffers)

    @property
    def size_bytes(self) -> int:
        return sum(len(buffer) for buffer in self.buffers)

    def to_bytes(self) -> bytes:
        return b"".join(self.buffers)

    async def prepare(
        self, blobs: BlobsProtocol, *, receivers: int
    ) -> tuple[MessageContent, OfferProtocol | None]:
        """Offer a blob to *receivers*. Returns the content of the event, and the offer to release after all replies."""
        if self.is_inline:
            return MessageContent(inline=self.to_bytes()), None
        offer = await blobs.offer(self.buffers, receivers=receivers, sha256=self.sha256)
        return MessageContent(blob=offer.ref), offer


async def fetch_content(
    content: MessageContent | None, blobs: BlobsProtocol, *, timeout_s: float
) -> bytes | memoryview:
    """Return the bytes of *content*, inline or from its blob. Raises the errors of `BlobsProtocol.fetch`.

    Raises:
        ContentMissing: *content* is None, or has neither inline bytes nor a blob.

    """
    if content is not None and content.inline is not None:
        return content.inline
    if content is not None and content.blob is not None:
        return await blobs.fetch(content.blob, timeout_s=min(timeout_s, IDLE_TIMEOUT_S))
    raise ContentMissing("the message has neither content nor an error")


def _digest(buffers: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()
