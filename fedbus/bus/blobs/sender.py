"""The sender's side: the offers, and which transfer sends the next chunk.

The only state about a receiver is the chunks that it has requested and not received. It may be dropped at any time,
since the receiver repeats its requests. One task sends everything, one chunk for each transfer in round-robin
order, as fast as the socket accepts it, so that the unwritten data stays small.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import (
    ConnectionClosedError,
    ConnectionDrainingError,
    ConnectionReconnectingError,
    OutboundBufferLimitError,
)

from fedbus.bus.blobs import protocol
from fedbus.bus.blobs.multicast import MulticastPhase, MulticastState
from fedbus.bus.blobs.offer import BlobOffer
from fedbus.bus.blobs.protocol import ChunkRequest
from fedbus.bus.blobs.sources import BlobGone, BlobSource, BytesLike
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.model import BlobRef
from fedbus.contracts.telemetry import BLOB_IO, increment

MULTICAST_GATHER_S: Final = 0.05
"""How long a multicast waits for the rest of its cohort after the first request."""
SLOW_RECEIVER_S: Final = 0.3
"""How long one receiver may delay the others."""
MAX_FETCHES_SERVED: Final = 4096
"""Requests beyond this many fetches are dropped; the receiver repeats them."""
MAX_UNWRITTEN_BYTES: Final = protocol.CHUNK_BYTES
"""Unwritten bytes from which the sender waits for the socket before it reads the next chunk."""
TRANSMIT_ATTRIBUTES: Final = {"network.io.direction": "transmit"}
NO_SUCH_BLOB: Final = "the sender does not offer this blob (any more); request a new reference"


@dataclass(frozen=True)
class Probe:
    """A queued probe; it follows the chunks that were requested before it."""

    number: int


class UnicastTransfer:
    """The chunks that one fetch has requested and that are not sent yet."""

    def __init__(self, offer: BlobOffer, place: str) -> None:
        self.offer = offer
        self.inbox = place
        self.is_queued = False
        self._pending: deque[int | Probe] = deque()

    def add_pending(self, chunks: Iterable[int | Probe]) -> None:
        known = set(self._pending)
        self._pending.extend(one for one in chunks if one not in known)
        while len(self._pending) > protocol.MAX_REQUEST_CHUNKS:
            self._pending.pop()

    async def next_message(self) -> tuple[str, BytesLike] | None:
        """Return subject and body of the next message; None if nothing is queued. Raises BlobGone."""
        match self._pending.popleft() if self._pending else None:
            case None:
                return None
            case Probe(number):
                return f"{self.inbox}.{protocol.PROBE_REPLY}", protocol.ProbeReply(
                    number, self._sent_until()
                ).pack()
            case index:
                return f"{self.inbox}.{index}", await self.offer.read_chunk(index)

    def _sent_until(self) -> int:
        """Return the index below which all requested chunks are sent: a multicast has its own position."""
        cast = self.offer.multicast
        return cast.position if cast is not None and cast.covers(self.inbox) else self.offer.ref.chunk_count


class MulticastTransfer:
    """A multicast, and the timer that it waits on."""

    def __init__(self, fed: FederationId, offer: BlobOffer, cast: MulticastState) -> None:
        self.offer = offer
        self.state = cast
        self.is_queued = False
        self._fed = fed
        self._timer: asyncio.TimerHandle | None = None

    async def next_message(self) -> tuple[str, BytesLike] | None:
        """Return subject and body of the next message; None if a receiver is not ready for it. Raises BlobGone."""
        place = protocol.multicast_subject(self._fed, self.offer.ref.holder, self.state.number)
        if (index := self.state.next_chunk()) is None:
            return None
        return f"{place}.{index}", await self.offer.read_chunk(index)

    def schedule(self, seconds: float, then: Callable[["MulticastTransfer"], None]) -> None:
        """Call *then* after *seconds*, unless `cancel_timer` is called before. A running timer is not changed."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._timer_fired, then)

    def cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timer_fired(self, then: Callable[["MulticastTransfer"], None]) -> None:
        self._timer = None
        then(self)


class BlobSender:
    def __init__(self, connection: Client, fed: FederationId, holder: str) -> None:
        self._connection = connection
        self._fed = fed
        self._holder = holder
        self._offers: dict[str, list[BlobOffer]] = {}
        self._unicasts: dict[str, UnicastTransfer] = {}
        self._multicasts: dict[BlobOffer, MulticastTransfer] = {}
        self._transfers: deque[UnicastTransfer | MulticastTransfer] = deque()
        self._notices: deque[tuple[str, bytes]] = deque()
        self._work = asyncio.Event()
        self._closed = False

    def offer(self, content: BlobSource, *, sha256: str, receivers: int) -> BlobOffer:
        ref = BlobRef(
            sha256=sha256,
            size_bytes=content.size_bytes,
            chunk_bytes=min(protocol.CHUNK_BYTES, self._connection.max_payload),
            holder=self._holder,
        )
        offer = BlobOffer(ref, content, receivers=receivers, withdraw=self._withdraw)
        self._offers.setdefault(sha256, []).append(offer)
        if offer.multicast is not None:
            self._multicasts[offer] = MulticastTransfer(self._fed, offer, offer.multicast)
        return offer

    def close(self) -> None:
        """Stop serving and release all offers."""
        self._closed = True
        self._work.set()
        for offer in [offer for offers in self._offers.values() for offer in offers]:
            offer.release()

    def _withdraw(self, offer: BlobOffer) -> None:
        offers = self._offers[offer.ref.sha256]
        offers.remove(offer)
        if not offers:
            del self._offers[offer.ref.sha256]
        if (cast := self._multicasts.pop(offer, None)) is not None:
            cast.cancel_timer()

    # --- requests -----------------------------------------------------------------

    async def on_request(self, message: Msg) -> None:
        """Handle a request. An invalid one, or one whose reply subject is not the requester's, is dropped."""
        request, place = ChunkRequest.unpack(message.data), message.reply
        asker = message.subject.rpartition(".")[2]
        if request is None or not protocol.is_inbox_of(self._fed, place, asker):
            return
        if not (offers := self._offers.get(request.sha256)):
            self._notify(f"{place}.{protocol.UNAVAILABLE}", NO_SUCH_BLOB.encode())
            return
        if not self._served_by_multicast(offers[-1], request, place):
            self._send_later(offers[-1], place, request.clip_to(offers[-1].ref.chunk_count))
        if request.probe:
            self._send_later(offers[-1], place, [Probe(request.probe)])

    def _served_by_multicast(self, offer: BlobOffer, request: ChunkRequest, place: str) -> bool:
        if (transfer := self._multicasts.get(offer)) is None:
            return False
        if request.multicast and transfer.state.grant_credit(place, request.multicast, request.until):
            self._send_later(offer, place, range(request.first, min(request.until, transfer.state.position)))
            self._advance_multicast(transfer)
            return True
        if transfer.state.invite(place, request.clip_to(offer.ref.chunk_count)):
            self._invite(transfer, place)
            return True
        return False

    def _send_later(self, offer: BlobOffer, place: str, chunks: Sequence[int | Probe]) -> None:
        fetch = self._unicasts.get(place)
        if fetch is None or fetch.offer is not offer:
            if not chunks or len(self._unicasts) >= MAX_FETCHES_SERVED:
                return
            fetch = self._unicasts[place] = UnicastTransfer(offer, place)
        fetch.add_pending(chunks)
        self._enqueue(fetch)

    # --- multicast ----------------------------------------------------------------

    def _invite(self, transfer: MulticastTransfer, place: str) -> None:
        self._notify(f"{place}.{protocol.MULTICAST}", str(transfer.state.number).encode())
        transfer.schedule(MULTICAST_GATHER_S, self._start_multicast)

    def _advance_multicast(self, transfer: MulticastTransfer) -> None:
        """Continue after a receiver has accepted, or requested more."""
        if transfer.state.phase is MulticastPhase.GATHERING and transfer.state.has_all_receivers:
            transfer.cancel_timer()
            self._start_multicast(transfer)
        elif transfer.state.phase is MulticastPhase.SENDING and not transfer.state.is_blocked:
            transfer.cancel_timer()
            self._enqueue(transfer)

    def _start_multicast(self, transfer: MulticastTransfer) -> None:
        for place, chunks in transfer.state.start().items():
            self._send_later(transfer.offer, place, chunks)
        self._enqueue(transfer)

    def _drop_slow_receivers(self, transfer: MulticastTransfer) -> None:
        for place in transfer.state.drop_slow_receivers():
            self._invite(transfer, place)

    # --- sending --------------------------------------------------------------------

    async def serve(self) -> None:
        """Send queued messages until closed."""
        while not self._closed:
            await self._work.wait()
            self._work.clear()
            try:
                while (self._notices or self._transfers) and not self._closed:
                    await self._send_next()
            except (OutboundBufferLimitError, ConnectionReconnectingError):
                self._remove_all_transfers()  # disconnected; receivers repeat their requests
            except (ConnectionClosedError, ConnectionDrainingError):
                return

    async def _send_next(self) -> None:
        if self._notices:
            await self._connection.publish(*self._notices.popleft())
            return
        transfer = self._transfers.popleft()
        transfer.is_queued = False
        try:
            await self._send_chunk(transfer)
        except BlobGone:
            transfer.offer.release()
            self._remove_transfer(transfer)

    async def _send_chunk(self, transfer: UnicastTransfer | MulticastTransfer) -> None:
        """Send one chunk, and queue the transfer again behind the others."""
        if (message := await transfer.next_message()) is None:
            self._remove_transfer(transfer)
            return
        self._enqueue(transfer)
        place, body = message
        await self._connection.publish(place, body)  # type: ignore[arg-type]  # nats-py accepts any buffer
        increment(BLOB_IO, TRANSMIT_ATTRIBUTES, len(body))
        await self._wait_for_socket()

    async def _wait_for_socket(self) -> None:
        """Wait until little data is unwritten. nats-py 2.16 has no public method: `flush` sends its PING first."""
        if self._connection.pending_data_size >= MAX_UNWRITTEN_BYTES:
            await self._connection._flush_pending(force_flush=True)  # noqa: SLF001 - nats-py's
        if not self._connection.is_connected:
            raise ConnectionReconnectingError

    def _remove_transfer(self, transfer: UnicastTransfer | MulticastTransfer) -> None:
        """Drop a transfer that has nothing to send now; a delayed multicast waits for its slow receivers."""
        match transfer:
            case UnicastTransfer():
                if self._unicasts.get(transfer.inbox) is transfer:
                    del self._unicasts[transfer.inbox]
            case MulticastTransfer() if transfer.state.is_blocked:
                transfer.schedule(SLOW_RECEIVER_S, self._drop_slow_receivers)
            case _:
                pass

    def _remove_all_transfers(self) -> None:
        self._notices.clear()
        for transfer in self._transfers:
            transfer.is_queued = False
        self._transfers.clear()
        self._unicasts.clear()

    def _enqueue(self, transfer: UnicastTransfer | MulticastTransfer) -> None:
        if not transfer.is_queued:
            transfer.is_queued = True
            self._transfers.append(transfer)
            self._work.set()

    def _notify(self, place: str, body: bytes) -> None:
        self._notices.append((place, body))
        self._work.set()
