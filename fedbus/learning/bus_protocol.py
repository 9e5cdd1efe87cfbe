"""The interface of the bus that learning needs. Callers pass the bus in; this package does not import it."""

from typing import Protocol

from fedbus.contracts.message import Message
from fedbus.contracts.model import BlobRef


class OfferProtocol(Protocol):
    """An offered blob, which receivers can fetch by its *ref* until `release`."""

    @property
    def ref(self) -> BlobRef: ...

    def release(self) -> None: ...


class BlobsProtocol(Protocol):
    """Blob transfer, addressed by SHA-256 digest."""

    async def offer(
        self, data: list[memoryview], *, receivers: int = 1, sha256: str | None = None
    ) -> OfferProtocol: ...

    async def fetch(self, ref: BlobRef, *, timeout_s: float) -> memoryview:
        """Return the verified bytes of the blob *ref*.

        Raises an error of the implementation if no chunk arrives within *timeout_s* seconds.
        """
        ...


class BusProtocol(Protocol):
    """The bus as a training process uses it."""

    @property
    def blobs(self) -> BlobsProtocol: ...

    @property
    def is_connected(self) -> bool:
        """Whether NATS is connected. While it is not, a missing heartbeat does not mean a lost client."""
        ...

    async def publish(self, message: Message, *, id: str | None = None) -> None: ...
