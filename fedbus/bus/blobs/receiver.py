"""The receiver's side: asks for what it can take, puts it in its place, asks for more.

Every Ask may be repeated, and is when nothing comes: that is how lost chunks, a restarted
broker, a restarted holder and a cast that has gone on are all dealt with. It is given up
only when nothing has come for all of a time-out, however long the whole takes.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import (
    BadSubscriptionError,
    ConnectionClosedError,
    ConnectionDrainingError,
    OutboundBufferLimitError,
)

from fedbus.bus.blobs import protocol
from fedbus.bus.blobs.errors import BlobCorrupt, BlobUnavailable
from fedbus.bus.blobs.protocol import ChunkRequest, ProbeReply
from fedbus.bus.blobs.receive_progress import ReceiveProgress
from fedbus.bus.blobs.sinks import BlobSink
from fedbus.bus.nats.cancellation import propagate_cancellation
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.model import BlobRef
from fedbus.contracts.telemetry import BLOB_IO, increment

MIN_PROBE_S: Final = 0.1
MAX_PROBE_S: Final = 4.0
"""How long a fetch waits for a chunk before it probes: the first time, and at most."""
MAX_REASON_BYTES: Final = 300
RECEIVE_ATTRIBUTES: Final = {"network.io.direction": "receive"}
NO_RESPONDERS: Final = "503"
HOLDER_NOT_FOUND: Final = "nobody of that name is on the bus; see whether its process runs"
HOLDER_SILENT: Final = "it does not answer; see whether its process and the broker run"


class BlobReceiver:
    """All fetches of a process."""

    def __init__(self, connection: Client, fed: FederationId, receiver: str) -> None:
        self._connection = connection
        self._fed = fed
        self._receiver = receiver
        self._inbox_length = len(protocol.inbox_subject(fed, receiver, ""))
        self._fetches: dict[str, BlobDownload] = {}

    async def hear(self, message: Msg) -> None:
        """A chunk, or word, for one of the fetches; what comes too late is for none."""
        name, *word = message.subject[self._inbox_length :].split(".")
        if (fetch := self._fetches.get(name)) is not None:
            fetch.hear(word[0] if word else "", message)

    async def fetch(self, ref: BlobRef, sink: BlobSink, timeout_s: float) -> None:
        name = secrets.token_hex(8)
        place = protocol.inbox_subject(self._fed, self._receiver, name)
        fetch = BlobDownload(self._connection, self._fed, ref, self._receiver, place, self._share)
        self._fetches[name] = fetch
        try:
            await fetch.run(sink, timeout_s)
        finally:
            del self._fetches[name]
            await fetch.leave_cast()

    def _share(self) -> int:
        """What one fetch may have in flight, now that there are so many."""
        return min(protocol.WINDOW_BYTES, protocol.SHARED_WINDOW_BYTES // len(self._fetches))


class BlobDownload:
    """One blob on its way to one place."""

    def __init__(
        self,
        connection: Client,
        fed: FederationId,
        ref: BlobRef,
        receiver: str,
        place: str,
        share: Callable[[], int],
    ) -> None:
        self._connection = connection
        self._fed = fed
        self._ref = ref
        self._place = place
        self._asks = protocol.request_subject(fed, ref.holder, protocol.owner_of(receiver))
        self._share = share
        self._progress = ReceiveProgress(chunks=ref.chunk_count)
        self._news = asyncio.Event()
        self._probe = 0
        self._lost_below = 0
        self._lie = ""
        self._refusal = ""
        self._trouble = HOLDER_SILENT
        self._invitation = 0
        self._cast = 0
        self._cast_subscription: Subscription | None = None

    # --- what is heard ------------------------------------------------------------

    def hear(self, word: str, message: Msg) -> None:
        match word:
            case protocol.MULTICAST:
                self._hear_invitation(_parse_number(message.data))
            case protocol.PROBE_REPLY:
                self._hear_answer(ProbeReply.unpack(message.data))
            case protocol.UNAVAILABLE:
                self._hear_refusal(message.data[:MAX_REASON_BYTES].decode(errors="replace"))
            case "":
                if (message.headers or {}).get("Status") == NO_RESPONDERS:
                    self._trouble = HOLDER_NOT_FOUND
            case _:
                self._hear_chunk(_parse_number(word.encode()), message.data)

    async def _hear_cast(self, message: Msg) -> None:
        self.hear(message.subject.rpartition(".")[2], message)

    def _hear_chunk(self, index: int, chunk: bytes) -> None:
        expected = self._ref.chunk_size(index)
        if expected < 0:
            self._lie = f"it is sent a chunk that it has not: {self._ref.chunk_count} are all"
        elif len(chunk) != expected:
            self._lie = f"chunk {index} has {len(chunk)} bytes, and should have {expected}"
        elif not self._progress.arrive(index, chunk):
            return
        increment(BLOB_IO, RECEIVE_ATTRIBUTES, len(chunk))
        self._news.set()

    def _hear_answer(self, here: ProbeReply | None) -> None:
        """What was sent before has come, or never will."""
        if here is not None and here.probe == self._probe:
            self._lost_below = here.until
            self._news.set()

    def _hear_refusal(self, reason: str) -> None:
        """A holder that had the blob may be starting again, and about to offer it: only a first answer is the last."""
        self._trouble = reason
        if not self._progress.begun:
            self._refusal = reason
            self._news.set()

    def _hear_invitation(self, cast: int) -> None:
        if cast not in (0, self._cast):
            self._invitation = cast
            self._news.set()

    # --- what is done ---------------------------------------------------------------

    async def run(self, sink: BlobSink, timeout_s: float) -> None:
        """Until *sink* has all of it, and has found it right."""
        self._progress = ReceiveProgress(
            chunks=self._ref.chunk_count, first=-(-sink.held_bytes // self._ref.chunk_bytes)
        )
        patience = ProbeTimer(timeout_s)
        await self._ask_for_more()
        while not self._progress.complete:
            if not await self._heard_something(patience.next_probe_s()):
                await self._probe_again()
                patience.probed()
            await self._follow_up()
            if await self._took_chunks(sink):
                patience.progressed()
            elif patience.is_over():
                raise BlobUnavailable(self._ref, f"no data for {timeout_s:g} s; {self._trouble}")
        await sink.finish()

    async def leave_cast(self) -> None:
        if self._cast_subscription is not None:
            with suppress(ConnectionClosedError, ConnectionDrainingError, BadSubscriptionError):
                await self._cast_subscription.unsubscribe()
            self._cast_subscription = None

    async def _heard_something(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True

    async def _follow_up(self) -> None:
        """Do what was said, where something was."""
        if self._lie:
            raise BlobCorrupt(self._ref, self._lie)
        if self._refusal:
            raise BlobUnavailable(self._ref, self._refusal)
        if self._invitation:
            await self._join_cast()
        if self._lost_below:
            await self._ask_for_missing()

    async def _took_chunks(self, sink: BlobSink) -> bool:
        if not (chunks := self._progress.take()):
            return False
        await sink.put(chunks)
        await self._ask_for_more()
        return True

    async def _join_cast(self) -> None:
        """Subscribe, and only then say what may be sent: nothing can be lost in between."""
        await self.leave_cast()
        self._cast, self._invitation = self._invitation, 0
        subject = f"{protocol.multicast_subject(self._fed, self._ref.holder, self._cast)}.*"
        self._cast_subscription = await self._connection.subscribe(subject, cb=self._hear_cast)
        credit = self._progress.asked_until
        await self._ask(range(credit, credit))

    async def _ask_for_more(self) -> None:
        if chunks := self._progress.ask(max(1, self._share() // self._ref.chunk_bytes)):
            await self._ask(chunks)

    async def _ask_for_missing(self) -> None:
        below, self._lost_below = self._lost_below, 0
        for chunks in list(self._progress.missing(below)):
            await self._ask(chunks)

    async def _probe_again(self) -> None:
        self._probe = secrets.randbits(31) + 1
        credit = self._progress.asked_until
        await self._ask(range(credit, credit), probe=self._probe)

    async def _ask(self, chunks: range, *, probe: int = 0) -> None:
        ask = ChunkRequest(self._ref.sha256, chunks.start, chunks.stop, self._cast, probe)
        try:
            with propagate_cancellation():
                await self._connection.publish(self._asks, ask.pack(), reply=self._place)
        except OutboundBufferLimitError:  # the broker is away; the next probe will tell
            pass
        except (ConnectionClosedError, ConnectionDrainingError):
            raise BlobUnavailable(self._ref, "the connection to the bus is closed; open it again") from None


class ProbeTimer:
    """When to probe, and when to give up: both counted from the last chunk."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.progressed()

    def progressed(self) -> None:
        self._since = time.monotonic()
        self._silence_s = MIN_PROBE_S
        self._probe_at = self._since + self._silence_s

    def probed(self) -> None:
        self._silence_s = min(2 * self._silence_s, MAX_PROBE_S)
        self._probe_at = time.monotonic() + self._silence_s

    def next_probe_s(self) -> float:
        return max(0.0, min(self._probe_at, self._since + self._timeout_s) - time.monotonic())

    def is_over(self) -> bool:
        return time.monotonic() - self._since >= self._timeout_s


def _parse_number(text: bytes) -> int:
    """The number in *text*, or one that nobody has given."""
    return int(text) if text.isdigit() and len(text) <= 20 else -1
