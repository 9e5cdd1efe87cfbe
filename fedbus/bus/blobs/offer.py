"""A blob that is given to whoever asks."""

from collections.abc import Callable
from typing import Final, Self

from fedbus.bus.blobs.multicast import MulticastState
from fedbus.bus.blobs.sources import BlobGone, BlobSource, BytesLike
from fedbus.contracts.model import BlobRef

MULTICAST_MIN_SAVED_BYTES: Final = 2 * 1024**2
"""What a cast must save to be worth its invitation, which every receiver has to accept before the first chunk."""


class BlobOffer:
    """Given to whoever asks, until it is released. Its bytes must not change until then."""

    def __init__(
        self, ref: BlobRef, content: BlobSource, *, receivers: int, withdraw: Callable[["BlobOffer"], None]
    ) -> None:
        self.ref = ref
        saved_bytes = (receivers - 1) * ref.size_bytes
        self.cast = (
            MulticastState(chunks=ref.chunk_count, receivers=receivers)
            if saved_bytes >= MULTICAST_MIN_SAVED_BYTES
            else None
        )
        self.released = False
        self._content = content
        self._withdraw = withdraw

    def release(self) -> None:
        """Give it to no one any more, and let go of the bytes."""
        if not self.released:
            self.released = True
            self._withdraw(self)
            self._content.close()

    async def chunk(self, index: int) -> BytesLike:
        """The bytes of one chunk; raises Gone."""
        if self.released:
            raise BlobGone
        start = index * self.ref.chunk_bytes
        return await self._content.read(start, min(start + self.ref.chunk_bytes, self.ref.size_bytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()
