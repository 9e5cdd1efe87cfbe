"""Blob transfer: content-addressed weights over core NATS, in chunks, at the receiver's pace.

    async with Blobs.open(connection, fed, holder="server-mnist-1-grid") as blobs:
        async with await blobs.offer([head, *arrays], receivers=4) as offer:
            ...                       # publish offer.ref in an event; keep the block open until all have it

    weights = await blobs.fetch(ref, into=buffer)         # verified; a view of `buffer`
    await blobs.fetch_to(ref, Path("model.safetensors"))  # verified, resumed, renamed into place

The sender sends only what a receiver requests, so that the sender, the NATS server and the receiver buffer at
most one window for each fetch. Requests are idempotent, and repeating them is the whole recovery: after a restart
of the NATS server or the sender, the receiver requests the missing chunks again. A blob for a cohort is sent by
multicast: once, and the NATS server distributes it.

The modules: `protocol` defines the messages, `sources` what is offered, `sinks` where it is written, `offer` and
`sender` are the sender's side with `multicast` for cohorts, `receiver` is the receiver's side with
`receive_progress`, and `malloc` configures the allocator.
"""

from fedbus.bus.blobs.blobs import Blobs
from fedbus.bus.blobs.errors import BlobCorrupt, BlobError, BlobUnavailable
from fedbus.bus.blobs.offer import BlobOffer
from fedbus.bus.blobs.protocol import CHUNK_BYTES, WINDOW_BYTES

__all__ = ["CHUNK_BYTES", "WINDOW_BYTES", "BlobCorrupt", "BlobError", "BlobOffer", "BlobUnavailable", "Blobs"]
