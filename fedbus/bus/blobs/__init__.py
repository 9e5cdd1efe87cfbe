"""Weights in flight: content-addressed blobs over core NATS, in chunks, at the receiver's pace.

    async with Blobs.open(connection, fed, holder="server-mnist-1-grid") as blobs:
        async with await blobs.offer([head, *arrays], receivers=4) as offer:
            ...                       # say offer.ref in an event; keep the block open until all have it

    weights = await blobs.fetch(ref, into=buffer)         # verified; a view of `buffer`
    await blobs.fetch_to(ref, Path("model.safetensors"))  # verified, resumed, renamed into place

What a receiver does not ask for is never sent, so no more than one window per fetch is held
anywhere: not by the holder, not by the broker, not by the receiver. Asking again is always
harmless, and that is the whole recovery: a broker or holder that restarts is asked again for
what is missing. A blob that a cohort wants is cast: sent once, fanned out by the broker.

The modules: `wire` is what the two sides say to each other, `contents` what is offered, `sinks`
where it is put, `holding` the holder's side with `casting` for cohorts, `fetching` the
receiver's side with `progress`, and `malloc` a word with the allocator.
"""

from fedbus.bus.blobs.blobs import Blobs
from fedbus.bus.blobs.errors import BlobCorrupt, BlobError, BlobUnavailable
from fedbus.bus.blobs.offer import BlobOffer
from fedbus.bus.blobs.protocol import CHUNK_BYTES, WINDOW_BYTES

__all__ = ["CHUNK_BYTES", "WINDOW_BYTES", "BlobCorrupt", "BlobError", "BlobOffer", "BlobUnavailable", "Blobs"]
