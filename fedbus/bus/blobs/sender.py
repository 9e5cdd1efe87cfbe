"""The holder's side: what is offered, and to whom the next chunk goes.

The holder knows nothing of a receiver but the chunks that it has asked for and not got, and
may forget even that, for it asks again. One task sends everything, a chunk for each in
turn, as fast as the connection takes it: what is not written yet stays small, whatever the
connection would let wait.
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
"""How long a cast waits for the rest of its cohort, after the first has asked."""
SLOW_RECEIVER_S: Final = 0.3
"""How long one listener may hold up the others."""
MAX_FETCHES_SERVED: Final = 4096
"""Beyond, an Ask is dropped; its sender will repeat it."""
MAX_UNWRITTEN_BYTES: Final = protocol.CHUNK_BYTES
"""What may wait for the socket before the next chunk is read."""
TRANSMIT_ATTRIBUTES: Final = {"network.io.direction": "transmit"}
NO_SUCH_BLOB: Final = "it does not hold this blob (any more); ask for a new reference"


@dataclass(frozen=True)
class Probe:
    """Stands behind the chunks that were asked for before it."""

    number: int


class UnicastTransfer:
    """What one fetch has asked for and not got."""

    def __init__(self, offer: BlobOffer, place: str) -> None:
        self.offer = offer
        self.place = place
        self.queued = False
        self._owed: deque[int | Probe] = deque()

    def owe(self, owed: Iterable[int | Probe]) -> None:
        known = set(self._owed)
        self._owed.extend(one for one in owed if one not in known)
        while len(self._owed) > protocol.MAX_REQUEST_CHUNKS:
            self._owed.pop()

    async def next_message(self) -> tuple[str, BytesLike] | None:
        """What is sent next, and where; None when nothing is owed now. Raises Gone."""
        match self._owed.popleft() if self._owed else None:
            case None:
                return None
            case Probe(number):
                return f"{self.place}.{protocol.PROBE_REPLY}", protocol.ProbeReply(
                    number, self._sent_until()
                ).pack()
            case index:
                return f"{self.place}.{index}", await self.offer.chunk(index)

    def _sent_until(self) -> int:
        """A cast is ahead of this turn or behind it; below its position all is sent."""
        cast = self.offer.cast
        return cast.position if cast is not None and cast.covers(self.place) else self.offer.ref.chunk_count


class MulticastTransfer:
    """A cast, and the clock that it waits by."""

    def __init__(self, fed: FederationId, offer: BlobOffer, cast: MulticastState) -> None:
        self.offer = offer
        self.cast = cast
        self.queued = False
        self._fed = fed
        self._timer: asyncio.TimerHandle | None = None

    async def next_message(self) -> tuple[str, BytesLike] | None:
        """What is sent next, and where; None when nothing is owed now. Raises Gone."""
        place = protocol.multicast_subject(self._fed, self.offer.ref.holder, self.cast.number)
        if (index := self.cast.next_chunk()) is None:
            return None
        return f"{place}.{index}", await self.offer.chunk(index)

    def wait(self, seconds: float, then: Callable[["MulticastTransfer"], None]) -> None:
        """Do *then* after some time, unless it goes on before. A wait that runs already is the one that counts."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._time_is_up, then)

    def go_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_up(self, then: Callable[["MulticastTransfer"], None]) -> None:
        self._timer = None
        then(self)


class BlobSender:
    def __init__(self, connection: Client, fed: FederationId, holder: str) -> None:
        self._connection = connection
        self._fed = fed
        self._holder = holder
        self._offers: dict[str, list[BlobOffer]] = {}
        self._fetches: dict[str, UnicastTransfer] = {}
        self._casts: dict[BlobOffer, MulticastTransfer] = {}
        self._turns: deque[UnicastTransfer | MulticastTransfer] = deque()
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
        if offer.cast is not None:
            self._casts[offer] = MulticastTransfer(self._fed, offer, offer.cast)
        return offer

    def close(self) -> None:
        """Serve no more, and let go of what is still offered."""
        self._closed = True
        self._work.set()
        for offer in [offer for offers in self._offers.values() for offer in offers]:
            offer.release()

    def _withdraw(self, offer: BlobOffer) -> None:
        offers = self._offers[offer.ref.sha256]
        offers.remove(offer)
        if not offers:
            del self._offers[offer.ref.sha256]
        if (cast := self._casts.pop(offer, None)) is not None:
            cast.go_on()

    # --- what is asked ------------------------------------------------------------

    async def hear(self, message: Msg) -> None:
        """Someone asks. Whoever is no receiver of this federation gets no answer."""
        ask, place = ChunkRequest.unpack(message.data), message.reply
        asker = message.subject.rpartition(".")[2]
        if ask is None or not protocol.is_inbox_of(self._fed, place, asker):
            return
        if not (offers := self._offers.get(ask.sha256)):
            self._notify(f"{place}.{protocol.UNAVAILABLE}", NO_SUCH_BLOB.encode())
            return
        if not self._answered_by_cast(offers[-1], ask, place):
            self._owe(offers[-1], place, ask.within(offers[-1].ref.chunk_count))
        if ask.probe:
            self._owe(offers[-1], place, [Probe(ask.probe)])

    def _answered_by_cast(self, offer: BlobOffer, ask: ChunkRequest, place: str) -> bool:
        if (turn := self._casts.get(offer)) is None:
            return False
        if ask.cast and turn.cast.grant(place, ask.cast, ask.until):
            self._owe(offer, place, range(ask.first, min(ask.until, turn.cast.position)))
            self._go_on(turn)
            return True
        if turn.cast.invite(place, ask.within(offer.ref.chunk_count)):
            self._invite(turn, place)
            return True
        return False

    def _owe(self, offer: BlobOffer, place: str, owed: Sequence[int | Probe]) -> None:
        fetch = self._fetches.get(place)
        if fetch is None or fetch.offer is not offer:
            if not owed or len(self._fetches) >= MAX_FETCHES_SERVED:
                return
            fetch = self._fetches[place] = UnicastTransfer(offer, place)
        fetch.owe(owed)
        self._queue(fetch)

    # --- casts --------------------------------------------------------------------

    def _invite(self, turn: MulticastTransfer, place: str) -> None:
        self._notify(f"{place}.{protocol.MULTICAST}", str(turn.cast.number).encode())
        turn.wait(MULTICAST_GATHER_S, self._begin)

    def _go_on(self, turn: MulticastTransfer) -> None:
        """A listener has accepted, or asked for more."""
        if turn.cast.phase is MulticastPhase.GATHERING and turn.cast.all_here:
            turn.go_on()
            self._begin(turn)
        elif turn.cast.phase is MulticastPhase.CASTING and not turn.cast.held_up:
            turn.go_on()
            self._queue(turn)

    def _begin(self, turn: MulticastTransfer) -> None:
        for place, owed in turn.cast.begin().items():
            self._owe(turn.offer, place, owed)
        self._queue(turn)

    def _go_on_without_laggards(self, turn: MulticastTransfer) -> None:
        for place in turn.cast.drop_laggards():
            self._invite(turn, place)

    # --- what is sent ---------------------------------------------------------------

    async def serve(self) -> None:
        """Send what is owed, until closed."""
        while not self._closed:
            await self._work.wait()
            self._work.clear()
            try:
                while (self._notices or self._turns) and not self._closed:
                    await self._send_next()
            except (
                OutboundBufferLimitError,
                ConnectionReconnectingError,
            ):  # the broker is away; who still wants something will ask again
                self._forget_all()
            except (ConnectionClosedError, ConnectionDrainingError):
                return

    async def _send_next(self) -> None:
        if self._notices:
            await self._connection.publish(*self._notices.popleft())
            return
        turn = self._turns.popleft()
        turn.queued = False
        try:
            await self._take(turn)
        except BlobGone:
            turn.offer.release()
            self._forget(turn)

    async def _take(self, turn: UnicastTransfer | MulticastTransfer) -> None:
        """One turn is one chunk."""
        if (message := await turn.next_message()) is None:
            self._forget(turn)
            return
        self._queue(turn)
        place, body = message
        await self._connection.publish(place, body)  # type: ignore[arg-type]  # any buffer will do
        increment(BLOB_IO, TRANSMIT_ATTRIBUTES, len(body))
        await self._written()

    async def _written(self) -> None:
        """Wait for the socket. nats-py 2.16 has no public way: its `flush` sends a PING ahead of all that waits."""
        if self._connection.pending_data_size >= MAX_UNWRITTEN_BYTES:
            await self._connection._flush_pending(force_flush=True)  # noqa: SLF001
        if not self._connection.is_connected:
            raise ConnectionReconnectingError

    def _forget(self, turn: UnicastTransfer | MulticastTransfer) -> None:
        """Nothing is owed here now."""
        match turn:
            case UnicastTransfer():
                if self._fetches.get(turn.place) is turn:
                    del self._fetches[turn.place]
            case MulticastTransfer() if turn.cast.held_up:
                turn.wait(SLOW_RECEIVER_S, self._go_on_without_laggards)

    def _forget_all(self) -> None:
        self._notices.clear()
        for turn in self._turns:
            turn.queued = False
        self._turns.clear()
        self._fetches.clear()

    def _queue(self, turn: UnicastTransfer | MulticastTransfer) -> None:
        if not turn.queued:
            turn.queued = True
            self._turns.append(turn)
            self._work.set()

    def _notify(self, place: str, what: bytes) -> None:
        self._notices.append((place, what))
        self._work.set()
