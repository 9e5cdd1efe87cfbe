"""What learning needs of the bus. It is handed in: this package does not import the bus."""

from typing import Protocol

from fedbus.contracts.message import Message
from fedbus.contracts.model import BlobRef


class OfferProtocol(Protocol):
    """Bytes that are given out to whoever asks for *ref*, until released."""

    @property
    def ref(self) -> BlobRef: ...

    def release(self) -> None: ...


class BlobsProtocol(Protocol):
    """Bytes in flight, by their digest."""

    async def offer(
        self, data: list[memoryview], *, receivers: int = 1, sha256: str | None = None
    ) -> OfferProtocol: ...

    async def fetch(self, ref: BlobRef, *, timeout_s: float) -> memoryview:
        """All of them, verified; raises when nothing has come for *timeout_s*."""
        ...


class BusProtocol(Protocol):
    """The bus as a process of learning uses it."""

    @property
    def blobs(self) -> BlobsProtocol: ...

    @property
    def connected(self) -> bool:
        """While it is not, silence says nothing about anybody."""
        ...

    async def publish(self, message: Message, *, id: str | None = None) -> None: ...
