"""Offer and fetch blobs: one `Blobs` object for each process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, Self

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import BadSubscriptionError, ConnectionClosedError, ConnectionDrainingError

from fedbus.bus.background import background_task
from fedbus.bus.blobs import protocol
from fedbus.bus.blobs.errors import BlobCorrupt, BlobUnavailable
from fedbus.bus.blobs.malloc import configure_malloc
from fedbus.bus.blobs.offer import BlobOffer
from fedbus.bus.blobs.receiver import BlobReceiver
from fedbus.bus.blobs.sender import BlobSender
from fedbus.bus.blobs.sinks import INLINE_BYTES, FileSink, MemorySink
from fedbus.bus.blobs.sources import BlobData, BlobSource, compute_digest, open_source
from fedbus.bus.blobs.threads import open_in_thread, run_in_thread
from fedbus.bus.nats.flush import flush_subscriptions
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.model import MAX_BLOB_BYTES, BlobRef

TIMEOUT_S: Final = 30.0
"""The time without any chunk after which a fetch fails; longer than a restart of the sender or the NATS server."""


class Blobs:
    def __init__(self, connection: Client, fed: FederationId, holder: str) -> None:
        self.holder = holder
        self._connection = connection
        self._fed = fed
        self._sender = BlobSender(connection, fed, holder)
        self._receiver = BlobReceiver(connection, fed, holder)

    @classmethod
    @asynccontextmanager
    async def open(cls, connection: Client, fed: FederationId, holder: str) -> AsyncIterator[Self]:
        """Serve offers under the name *holder* for the duration of the block.

        No other process may have the same name. Leave the block before the connection closes.
        """
        configure_malloc()
        blobs = cls(connection, fed, holder)
        requests = await connection.subscribe(
            protocol.request_subject(fed, holder), cb=blobs._sender.on_request
        )
        chunks = await connection.subscribe(
            protocol.inbox_subject(fed, holder, ">"), cb=blobs._receiver.on_message
        )
        await flush_subscriptions(connection)  # from here on a receiver of a reference can reach this process
        try:
            async with background_task(blobs._sender.serve(), name=f"blobs of {holder}"):
                try:
                    yield blobs
                finally:
                    blobs._sender.close()
        finally:
            await _unsubscribe(requests, chunks)

    async def offer(self, data: BlobData, *, receivers: int = 1, sha256: str | None = None) -> BlobOffer:
        """Offer *data* to all receivers until the offer is released.

        A list of buffers is one blob, as if they were joined.

        Args:
            data: The content.
            receivers: How many receivers are expected at about the same time; several are served by multicast.
            sha256: The digest, if it is known; it saves the hashing.

        Raises:
            ValueError: The content is too large for a blob.

        """
        content = await _open_source(data) if isinstance(data, Path) else open_source(data)
        try:
            _check_offered(content)
            digest = sha256 or await _compute_sha256(content)
        except BaseException:
            content.close()
            raise
        return self._sender.offer(content, sha256=digest, receivers=receivers)

    async def fetch(
        self, ref: BlobRef, into: memoryview | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> memoryview:
        """Fetch and verify a blob, into the beginning of *into* or into new memory.

        Raises:
            BlobCorrupt: The sender sent other content; *into* is undefined.
            BlobUnavailable: No chunk arrived for *timeout_s*; *into* is undefined.

        """
        _check_size(ref)
        sink = MemorySink(ref, into)
        await self._receiver.fetch(ref, sink, timeout_s)
        return sink.view

    async def fetch_to(self, ref: BlobRef, path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        """Fetch a blob into the file *path*, which is replaced atomically after the content is verified.

        The chunks of an interrupted fetch stay in a part file next to *path*, and the next fetch of the same blob
        continues from there. Raises as `fetch` does.
        """
        _check_size(ref)
        while True:
            async with FileSink.open(ref, path) as sink:
                try:
                    return await self._receiver.fetch(ref, sink, timeout_s)
                except BlobCorrupt:
                    await sink.discard()
                    if (
                        not sink.resumed_bytes
                    ):  # otherwise the old part file may be corrupt: try once without it
                        raise


def _check_offered(content: BlobSource) -> None:
    if content.size_bytes > MAX_BLOB_BYTES:
        raise ValueError(f"content too large for a blob: {content.size_bytes} bytes (limit {MAX_BLOB_BYTES})")


def _check_size(ref: BlobRef) -> None:
    if ref.size_bytes > MAX_BLOB_BYTES:
        raise BlobUnavailable(
            ref,
            f"is too large: {ref.size_bytes} bytes (limit {MAX_BLOB_BYTES}); transfer it through the model store",
        )


async def _compute_sha256(content: BlobSource) -> str:
    return (
        compute_digest(content)
        if content.size_bytes <= INLINE_BYTES
        else await run_in_thread(compute_digest, content)
    )


async def _unsubscribe(*subscriptions: Subscription) -> None:
    for subscription in subscriptions:
        with suppress(ConnectionClosedError, ConnectionDrainingError, BadSubscriptionError):
            await subscription.unsubscribe()


async def _open_source(path: Path) -> BlobSource:
    return await open_in_thread(lambda: open_source(path), lambda content: content.close())
