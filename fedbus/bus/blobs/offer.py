"""A blob that is offered to receivers."""

from collections.abc import Callable
from typing import Final, Self

from fedbus.bus.blobs.multicast import MulticastState
from fedbus.bus.blobs.sources import BlobGone, BlobSource, BytesLike
from fedbus.contracts.model import BlobRef

MULTICAST_MIN_SAVED_BYTES: Final = 2 * 1024**2
"""The saving from which a multicast is worth its invitations, which the receivers accept before the first chunk."""


class BlobOffer:
    """A blob that is offered until it is released; its bytes must not change until then."""

    def __init__(
        self, ref: BlobRef, content: BlobSource, *, receivers: int, withdraw: Callable[["BlobOffer"], None]
    ) -> None:
        self.ref = ref
        saved_bytes = (receivers - 1) * ref.size_bytes
        self.multicast = (
            MulticastState(chunks=ref.chunk_count, receivers=receivers)
            if saved_bytes >= MULTICAST_MIN_SAVED_BYTES
            else None
        )
        self.is_released = False
        self._source = content
        self._withdraw = withdraw

    def release(self) -> None:
        """End the offer and release the bytes."""
        if not self.is_released:
            self.is_released = True
            self._withdraw(self)
            self._source.close()

    async def read_chunk(self, index: int) -> BytesLike:
        """Return the bytes of one chunk; raises BlobGone."""
        if self.is_released:
            raise BlobGone
        start = index * self.ref.chunk_bytes
        return await self._source.read(start, min(start + self.ref.chunk_bytes, self.ref.size_bytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()
