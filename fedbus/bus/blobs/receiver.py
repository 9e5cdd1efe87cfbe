"""The receiver's side: requests as many chunks as it can take, writes them, requests more.

Every request can be repeated, and is repeated when nothing arrives. This handles lost chunks, a restart of the NATS
server or the sender, and a multicast that continued without this receiver. A fetch fails only if no chunk arrives
for the whole timeout; its total time has no limit.
"""

import asyncio
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
from fedbus.common import clock
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.model import BlobRef
from fedbus.contracts.telemetry import BLOB_IO, increment

MIN_PROBE_S: Final = 0.1
MAX_PROBE_S: Final = 4.0
"""The time without a chunk before a fetch probes: the first time, and at most."""
MAX_REASON_BYTES: Final = 300
RECEIVE_ATTRIBUTES: Final = {"network.io.direction": "receive"}
NO_RESPONDERS: Final = "503"
HOLDER_NOT_FOUND: Final = "the sender is not connected; check that its process is running"
HOLDER_SILENT: Final = "the sender does not reply; check that its process and the NATS server are running"


class BlobReceiver:
    """All fetches of a process."""

    def __init__(self, connection: Client, fed: FederationId, receiver: str) -> None:
        self._connection = connection
        self._fed = fed
        self._receiver = receiver
        self._inbox_length = len(protocol.inbox_subject(fed, receiver, ""))
        self._downloads: dict[str, BlobDownload] = {}

    async def on_message(self, message: Msg) -> None:
        """Dispatch a message to its fetch; a message for a fetch that has ended is dropped."""
        name, *kind = message.subject[self._inbox_length :].split(".")
        if (fetch := self._downloads.get(name)) is not None:
            fetch.on_message(kind[0] if kind else "", message)

    async def fetch(self, ref: BlobRef, sink: BlobSink, timeout_s: float) -> None:
        name = f"{clock.random_bits(64):016x}"
        place = protocol.inbox_subject(self._fed, self._receiver, name)
        fetch = BlobDownload(self._connection, self._fed, ref, self._receiver, place, self._window_bytes)
        self._downloads[name] = fetch
        try:
            await fetch.run(sink, timeout_s)
        finally:
            del self._downloads[name]
            await fetch.leave_multicast()

    def _window_bytes(self) -> int:
        """Return how much each of the current fetches may have in flight."""
        return min(protocol.WINDOW_BYTES, protocol.SHARED_WINDOW_BYTES // len(self._downloads))


class BlobDownload:
    """The transfer of one blob into one sink."""

    def __init__(
        self,
        connection: Client,
        fed: FederationId,
        ref: BlobRef,
        receiver: str,
        place: str,
        window_bytes: Callable[[], int],
    ) -> None:
        self._connection = connection
        self._fed = fed
        self._ref = ref
        self._inbox = place
        self._request_subject = protocol.request_subject(fed, ref.holder, protocol.owner_of(receiver))
        self._window_bytes = window_bytes
        self._progress = ReceiveProgress(chunks=ref.chunk_count)
        self._received = asyncio.Event()
        self._probe = 0
        self._lost_below = 0
        self._violation = ""
        self._refusal = ""
        self._timeout_cause = HOLDER_SILENT
        self._invitation = 0
        self._multicast = 0
        self._multicast_subscription: Subscription | None = None

    # --- messages -----------------------------------------------------------------

    def on_message(self, kind: str, message: Msg) -> None:
        match kind:
            case protocol.MULTICAST:
                self._on_invitation(_parse_number(message.data))
            case protocol.PROBE_REPLY:
                self._on_probe_reply(ProbeReply.unpack(message.data))
            case protocol.UNAVAILABLE:
                self._on_refusal(message.data[:MAX_REASON_BYTES].decode(errors="replace"))
            case "":
                if (message.headers or {}).get("Status") == NO_RESPONDERS:
                    self._timeout_cause = HOLDER_NOT_FOUND
            case _:
                self._on_chunk(_parse_number(kind.encode()), message.data)

    async def _on_multicast(self, message: Msg) -> None:
        self.on_message(message.subject.rpartition(".")[2], message)

    def _on_chunk(self, index: int, chunk: bytes) -> None:
        expected = self._ref.chunk_size(index)
        if expected < 0:
            self._violation = f"it sent chunk {index} (limit {self._ref.chunk_count - 1})"
        elif len(chunk) != expected:
            self._violation = f"chunk {index} has {len(chunk)} bytes (expected {expected})"
        elif not self._progress.record_arrival(index, chunk):
            return
        increment(BLOB_IO, RECEIVE_ATTRIBUTES, len(chunk))
        self._received.set()

    def _on_probe_reply(self, reply: ProbeReply | None) -> None:
        """Everything that was sent before the reply has arrived, or is lost."""
        if reply is not None and reply.probe == self._probe:
            self._lost_below = reply.until
            self._received.set()

    def _on_refusal(self, reason: str) -> None:
        """Give up only if no chunk has arrived: a sender that had the blob may be restarting and offer it again."""
        self._timeout_cause = reason
        if not self._progress.has_begun:
            self._refusal = reason
            self._received.set()

    def _on_invitation(self, cast: int) -> None:
        if cast not in (0, self._multicast):
            self._invitation = cast
            self._received.set()

    # --- the fetch ------------------------------------------------------------------

    async def run(self, sink: BlobSink, timeout_s: float) -> None:
        """Transfer until *sink* has the whole blob and has verified it.

        Raises:
            BlobCorrupt: The content does not match the reference.
            BlobUnavailable: The sender refused, or no chunk arrived for *timeout_s*.

        """
        self._progress = ReceiveProgress(
            chunks=self._ref.chunk_count, first=-(-sink.resumed_bytes // self._ref.chunk_bytes)
        )
        timer = ProbeTimer(timeout_s)
        await self._request_more()
        while not self._progress.is_complete:
            if not await self._wait_for_message(timer.next_probe_s()):
                await self._send_probe()
                timer.record_probe()
            await self._handle_messages()
            if await self._write_chunks(sink):
                timer.record_progress()
            elif timer.is_expired():
                raise BlobUnavailable(self._ref, f"no data for {timeout_s:g} s; {self._timeout_cause}")
        await sink.finish()

    async def leave_multicast(self) -> None:
        if self._multicast_subscription is not None:
            with suppress(ConnectionClosedError, ConnectionDrainingError, BadSubscriptionError):
                await self._multicast_subscription.unsubscribe()
            self._multicast_subscription = None

    async def _wait_for_message(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._received.wait()
        except TimeoutError:
            return False
        self._received.clear()
        return True

    async def _handle_messages(self) -> None:
        """React to the messages since the last call."""
        if self._violation:
            raise BlobCorrupt(self._ref, self._violation)
        if self._refusal:
            raise BlobUnavailable(self._ref, self._refusal)
        if self._invitation:
            await self._join_multicast()
        if self._lost_below:
            await self._request_missing()

    async def _write_chunks(self, sink: BlobSink) -> bool:
        if not (chunks := self._progress.take_ready()):
            return False
        await sink.put(chunks)
        await self._request_more()
        return True

    async def _join_multicast(self) -> None:
        """Subscribe, and only then grant credit, so that no chunk is lost in between."""
        await self.leave_multicast()
        self._multicast, self._invitation = self._invitation, 0
        subject = f"{protocol.multicast_subject(self._fed, self._ref.holder, self._multicast)}.*"
        self._multicast_subscription = await self._connection.subscribe(subject, cb=self._on_multicast)
        credit = self._progress.requested_until
        await self._send_request(range(credit, credit))

    async def _request_more(self) -> None:
        if chunks := self._progress.request_window(max(1, self._window_bytes() // self._ref.chunk_bytes)):
            await self._send_request(chunks)

    async def _request_missing(self) -> None:
        below, self._lost_below = self._lost_below, 0
        for chunks in list(self._progress.missing_ranges(below)):
            await self._send_request(chunks)

    async def _send_probe(self) -> None:
        self._probe = clock.random_bits(31) + 1
        credit = self._progress.requested_until
        await self._send_request(range(credit, credit), probe=self._probe)

    async def _send_request(self, chunks: range, *, probe: int = 0) -> None:
        request = ChunkRequest(self._ref.sha256, chunks.start, chunks.stop, self._multicast, probe)
        try:
            with propagate_cancellation():
                await self._connection.publish(self._request_subject, request.pack(), reply=self._inbox)
        except OutboundBufferLimitError:  # disconnected; the next probe repeats the request
            pass
        except (ConnectionClosedError, ConnectionDrainingError):
            raise BlobUnavailable(self._ref, "the connection to NATS is closed; open it again") from None


class ProbeTimer:
    """The times of the next probe and of giving up, counted from the last chunk."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.record_progress()

    def record_progress(self) -> None:
        self._since = clock.monotonic_s()
        self._silence_s = MIN_PROBE_S
        self._probe_at = self._since + self._silence_s

    def record_probe(self) -> None:
        self._silence_s = min(2 * self._silence_s, MAX_PROBE_S)
        self._probe_at = clock.monotonic_s() + self._silence_s

    def next_probe_s(self) -> float:
        return max(0.0, min(self._probe_at, self._since + self._timeout_s) - clock.monotonic_s())

    def is_expired(self) -> bool:
        return clock.monotonic_s() - self._since >= self._timeout_s


def _parse_number(text: bytes) -> int:
    """Parse the number in *text*; -1, which no sender uses, if it is invalid."""
    return int(text) if text.isdigit() and len(text) <= 20 else -1
