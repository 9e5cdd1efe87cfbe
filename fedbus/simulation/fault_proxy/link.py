"""One direction of a device's network: its bandwidth, which all connections share, and the delay of each burst.

The proxy cannot see messages, since they may be encrypted. A burst is what a connection sends without a pause of
`BURST_PAUSE_S`; it counts as one message: one latency, and the time of its retransmissions. TCP keeps the order, so
later bytes of the connection never overtake earlier ones.
"""

import asyncio
import itertools
from collections import deque
from typing import Final

from fedbus.simulation.profiles.conditions import DeviceConditions, Direction

BURST_PAUSE_S: Final = 0.02
CHUNK_BYTES: Final = 16 * 1024
"""The connections of a device take turns after so many bytes."""
MAX_IN_FLIGHT_BYTES: Final = 1024 * 1024
"""Bytes of one connection and direction that are delayed at the same time, like the window of TCP. The proxy reads no
more until they are delivered."""
MAX_IN_FLIGHT_CHUNKS: Final = 4096
MIN_SLEEP_S: Final = 0.001
"""Shorter pauses are made up for in the next one: the event loop cannot sleep that shortly."""


class Link:
    """One direction of the network of a device."""

    def __init__(self, device: DeviceConditions, direction: Direction) -> None:
        self._device = device
        self._direction = direction
        self._bytes_s = device.rate_bytes_s(direction)
        self._turn = asyncio.Lock()
        self._sent_at = 0.0
        """When the last byte so far has left, in the time of the event loop."""
        self._bursts = itertools.count()

    async def send(self, size: int) -> None:
        """Wait until *size* bytes have passed. Connections take turns."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            self._sent_at = max(self._sent_at, loop.time()) + size / self._bytes_s
            wait_s = self._sent_at - loop.time()
            if wait_s > MIN_SLEEP_S:
                await asyncio.sleep(wait_s)

    def next_delay_s(self) -> float:
        """Return the delay of the next burst: its latency and its retransmissions."""
        number = next(self._bursts)
        device, direction = self._device, self._direction
        return device.latency_s(direction, number) + device.retransmission_s(direction, number)


class DelayLine:
    """The bytes of one connection that are on their way in one direction. It has one sender and one receiver."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._is_filled = asyncio.Event()
        self._has_room = asyncio.Event()
        self._delay_s = 0.0
        self._last_sent_at = float("-inf")
        self._last_due = 0.0

    async def send(self, chunk: bytes) -> None:
        """Send *chunk*; wait for the bandwidth, and for room. An empty chunk is the end."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._last_sent_at > BURST_PAUSE_S:
            self._delay_s = self._link.next_delay_s()
        await self._link.send(len(chunk))
        while self._size >= MAX_IN_FLIGHT_BYTES or len(self._chunks) >= MAX_IN_FLIGHT_CHUNKS:
            self._has_room.clear()
            await self._has_room.wait()
        self._last_sent_at = loop.time()
        self._last_due = max(self._last_due, self._last_sent_at + self._delay_s)
        self._chunks.append((self._last_due, chunk))
        self._size += len(chunk)
        self._is_filled.set()

    async def receive(self) -> bytes:
        """Return the next chunk when it is due; empty at the end."""
        while not self._chunks:
            self._is_filled.clear()
            await self._is_filled.wait()
        due, chunk = self._chunks[0]
        wait_s = due - asyncio.get_running_loop().time()
        if wait_s > MIN_SLEEP_S:
            await asyncio.sleep(wait_s)
        self._chunks.popleft()
        self._size -= len(chunk)
        self._has_room.set()
        return chunk
