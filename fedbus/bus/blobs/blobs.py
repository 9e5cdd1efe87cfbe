"""The one object of a process that offers and fetches blobs."""

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
"""Without a single chunk. A holder or broker that restarts is back before."""


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
        """Serves what is offered, under the name *holder*, which no other process may have, until
        the block ends; so leave it before the connection is closed.
        """
        configure_malloc()
        blobs = cls(connection, fed, holder)
        asked = await connection.subscribe(protocol.request_subject(fed, holder), cb=blobs._sender.hear)
        arriving = await connection.subscribe(
            protocol.inbox_subject(fed, holder, ">"), cb=blobs._receiver.hear
        )
        await flush_subscriptions(connection)  # whoever hears of an offer from now on, finds us
        try:
            async with background_task(blobs._sender.serve(), name=f"blobs of {holder}"):
                try:
                    yield blobs
                finally:
                    blobs._sender.close()
        finally:
            await _unsubscribe(asked, arriving)

    async def offer(self, data: BlobData, *, receivers: int = 1, sha256: str | None = None) -> BlobOffer:
        """Give *data* to whoever asks for it, until the Offer is released.

        A list of buffers is one blob, as if they were joined. *receivers* are expected at about the
        same time: more than one get it by cast. *sha256*, where it is known, saves the hashing.
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
        """The blob, verified, at the beginning of *into* or in new memory.

        Raises BlobCorrupt, and BlobUnavailable when nothing has come for *timeout_s*; *into* holds
        nothing of worth then.
        """
        _check_size(ref)
        sink = MemorySink(ref, into)
        await self._receiver.fetch(ref, sink, timeout_s)
        return sink.view

    async def fetch_to(self, ref: BlobRef, path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        """The blob as the file *path*, which is there as a whole and verified, or as it was before.

        What had come when a fetch broke off stays beside *path*, and the next fetch of the same blob
        goes on from there. Raises as `fetch` does.
        """
        _check_size(ref)
        while True:
            async with FileSink.open(ref, path) as sink:
                try:
                    return await self._receiver.fetch(ref, sink, timeout_s)
                except BlobCorrupt:
                    await sink.discard()
                    if not sink.held_bytes:  # or what was left here may be what was wrong: once more without
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
