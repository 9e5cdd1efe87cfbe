"""A bus in memory, and clients on it, for tests of training libraries. It serialises messages and copies blobs."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fedbus.contracts.client import RoundReply
from fedbus.contracts.envelope import pack, unpack
from fedbus.contracts.message import Message
from fedbus.contracts.model import BlobRef
from fedbus.contracts.round_messages import RoundMessage
from fedbus.contracts.run import Scalar
from fedbus.learning.bus_protocol import BusProtocol
from fedbus.learning.library import ClientSession
from fedbus.learning.payload import fetch_content
from fedbus.learning.round_reply import make_incoming, make_reply


@dataclass
class MemoryOffer:
    ref: BlobRef
    blobs: "MemoryBlobs"

    def release(self) -> None:
        self.blobs.released += 1
        self.blobs.offers[self.ref.sha256] -= 1
        if not self.blobs.offers[self.ref.sha256]:
            del self.blobs.contents[self.ref.sha256]


@dataclass
class MemoryBlobs:
    contents: dict[str, bytes] = field(default_factory=dict)
    offers: Counter[str] = field(default_factory=Counter)
    """Open offers by digest; the same bytes may be offered twice."""
    offered: int = 0
    released: int = 0
    fetching: int = 0
    max_concurrent_fetches: int = 0
    fetched: int = 0
    stall_after: int = 1_000_000
    """The number of fetches that succeed; all later ones block."""

    async def offer(
        self,
        data: list[memoryview],
        *,
        receivers: int = 1,  # noqa: ARG002 - the interface of a bus
        sha256: str | None = None,
    ) -> MemoryOffer:
        content = b"".join(data)
        digest = hashlib.sha256(content).hexdigest()
        if sha256 not in {None, digest}:
            raise ValueError(f"the digest of the offered data is {digest}, not {sha256}")
        self.contents[digest] = content
        self.offers[digest] += 1
        self.offered += 1
        ref = BlobRef(sha256=digest, size_bytes=len(content), chunk_bytes=1024**2, holder="memory")
        return MemoryOffer(ref, self)

    async def fetch(self, ref: BlobRef, *, timeout_s: float) -> memoryview:  # noqa: ARG002
        self.fetching += 1
        self.max_concurrent_fetches = max(self.max_concurrent_fetches, self.fetching)
        try:
            await asyncio.sleep(3600 if self.fetched >= self.stall_after else 0)
            if ref.sha256 not in self.contents:
                raise ConnectionError(f"no offer of {ref.sha256[:8]}")
            return memoryview(bytearray(self.contents[ref.sha256]))
        finally:
            self.fetching -= 1
            self.fetched += 1


@dataclass
class MemoryBus:
    blobs: MemoryBlobs = field(default_factory=MemoryBlobs)
    is_connected: bool = True
    published: list[Message] = field(default_factory=list)
    subscribers: dict[str, Callable[[RoundMessage], None]] = field(default_factory=dict)

    async def publish(self, message: Message, *, id: str | None = None) -> None:  # noqa: ARG002
        received = type(message).model_validate(unpack(pack(message)))
        self.published.append(received)
        if isinstance(received, RoundMessage):
            self.subscribers[received.client](received)


@dataclass
class MemoryDevice:
    """A client: a session in a worker thread. A *silent* one receives messages and never replies."""

    session: ClientSession
    client: str
    bus: BusProtocol
    deliver: Callable[[Any], object]
    node_config: dict[str, Scalar] = field(default_factory=dict)
    received_messages: list[RoundMessage] = field(default_factory=list)
    is_silent: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def receive(self, message: RoundMessage) -> None:
        self.received_messages.append(message)
        if not self.is_silent:
            self.tasks.add(asyncio.get_running_loop().create_task(self.answer(message)))

    async def answer(self, message: RoundMessage) -> None:
        data = await fetch_content(message.content, self.bus.blobs, timeout_s=5)
        incoming = make_incoming(message, data, self.node_config)
        loop = asyncio.get_running_loop()
        response = await loop.run_in_executor(self.thread, self.session.handle, incoming)
        content = None
        if response.payload is not None:
            content, _ = await response.payload.prepare(self.bus.blobs, receivers=1)
        reply = make_reply(message, response, content)
        self.deliver(RoundReply.model_validate(unpack(pack(reply))))

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await asyncio.to_thread(self.thread.shutdown)
