"""A subscription of an in-memory connection."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import copy_context
from typing import TYPE_CHECKING

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import BadSubscriptionError, ConnectionClosedError
from nats.errors import TimeoutError as NatsTimeout
from nats.js.api import ConsumerInfo

if TYPE_CHECKING:
    from fedbus.bus.memory.client import MemoryClient
    from fedbus.bus.memory.consumer import PushConsumer

Callback = Callable[[Msg], Awaitable[None]]


class MemorySubscription(Subscription):
    """The messages on one subject, for a callback, or for one reader."""

    def __init__(
        self,
        client: "MemoryClient",
        number: int,
        subject: str,
        queue: str,
        callback: Callback | None,
    ) -> None:
        self._conn = client
        self._id = number
        self._subject = subject
        self._queue = queue
        self._cb = callback
        self._closed = False
        self._waiting: deque[Msg] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._handling: asyncio.Task[None] | None = None
        self._context = copy_context() if callback else None
        """The callback runs in the context of the subscriber, not in that of the publisher."""
        self._ordered: PushConsumer | None = None
        """The consumer of an ordered subscription."""

    @property
    def client(self) -> "MemoryClient":
        client: MemoryClient = self._conn
        return client

    # --- the server's side -----------------------------------------------------------------------

    def push(self, message: Msg) -> None:
        """Add a message that has arrived."""
        if self._closed:
            return
        self._waiting.append(message)
        if self._cb is not None:
            if self._handling is None:
                self._handling = asyncio.get_running_loop().create_task(
                    self._handle_all(), context=self._context
                )
        elif self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _handle_all(self) -> None:
        """Call the callback with each message, one at a time, until none waits."""
        assert self._cb is not None
        try:
            while self._waiting:
                try:
                    await self._cb(self._waiting.popleft())
                except Exception as error:  # noqa: BLE001 - as nats-py: it goes to the error callback
                    await self._conn.on_error(error)
        finally:
            self._handling = None

    def end(self) -> None:
        """End it; a reader that waits gets the end of the iteration."""
        self._closed = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        if self._handling is not None and self._handling is not asyncio.current_task():
            self._handling.cancel()

    async def finish(self) -> None:
        """Wait for the callback of the messages that have arrived."""
        if (handling := self._handling) is not None and handling is not asyncio.current_task():
            await asyncio.wait([handling])

    # --- nats-py's interface ----------------------------------------------------------------------

    @property
    def pending_msgs(self) -> int:
        return len(self._waiting)

    @property
    def messages(self) -> AsyncIterator[Msg]:
        return self

    def __aiter__(self) -> AsyncIterator[Msg]:
        return self

    async def __anext__(self) -> Msg:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            await self._wait()
        return self._waiting.popleft()

    async def _wait(self) -> None:
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    async def next_msg(self, timeout: float | None = 1.0) -> Msg:
        if self._conn.is_closed:
            raise ConnectionClosedError
        if not self._waiting:
            try:
                async with asyncio.timeout(timeout):
                    while not self._waiting and not self._closed:
                        await self._wait()
            except TimeoutError:
                raise NatsTimeout from None
            if self._closed:
                raise ConnectionClosedError
        return self._waiting.popleft()

    async def unsubscribe(self, limit: int = 0) -> None:  # noqa: ARG002 - nats-py's
        if self._conn.is_closed:
            raise ConnectionClosedError
        if self._closed:
            raise BadSubscriptionError
        self._conn.remove(self)

    async def drain(self) -> None:
        """Take no further messages, and end after the callback has handled those that have arrived."""
        self._conn.check_open()
        self._conn.detach(self)
        await self.finish()
        self._conn.remove(self)

    # --- an ordered consumer ------------------------------------------------------------------------

    def bind(self, consumer: "PushConsumer") -> None:
        self._ordered = consumer

    @property
    def ordered(self) -> "PushConsumer | None":
        return self._ordered

    @property
    def _sub(self) -> "MemorySubscription":
        return self

    _jsi = None
    """nats-py's state of an ordered consumer; the server creates none of these again, so it is not needed."""

    async def consumer_info(self) -> ConsumerInfo:
        assert self._ordered is not None
        await self._conn.round_trip(None)
        return self._ordered.info()
