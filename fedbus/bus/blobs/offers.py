"""A blob that is given to whoever asks."""

from collections.abc import Callable
from typing import Self

from fedbus.bus.blobs.casting import Cast
from fedbus.bus.blobs.contents import Bytes, Content, Gone
from fedbus.contracts.model import BlobRef


class Offer:
    """Given to whoever asks, until it is released. Its bytes must not change until then."""

    def __init__(
        self, ref: BlobRef, content: Content, *, receivers: int, withdraw: Callable[["Offer"], None]
    ) -> None:
        self.ref = ref
        self.cast = Cast(chunks=ref.chunks, receivers=receivers) if receivers > 1 else None
        self.released = False
        self._content = content
        self._withdraw = withdraw

    def release(self) -> None:
        """Give it to no one any more, and let go of the bytes."""
        if not self.released:
            self.released = True
            self._withdraw(self)
            self._content.close()

    async def chunk(self, index: int) -> Bytes:
        """The bytes of one chunk; raises Gone."""
        if self.released:
            raise Gone
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
