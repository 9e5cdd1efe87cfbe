"""A connection to an in-memory server: the part of nats-py's client that `fedbus.bus` uses."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import (
    ConnectionClosedError,
    ConnectionDrainingError,
    MaxPayloadError,
    NoRespondersError,
    OutboundBufferLimitError,
)
from nats.errors import TimeoutError as NatsTimeout

from fedbus.bus.memory.jetstream import MemoryJetStream
from fedbus.bus.memory.subject_index import check_subject
from fedbus.bus.memory.subscription import Callback, MemorySubscription

if TYPE_CHECKING:
    from fedbus.bus.memory.server import MemoryServer

NO_RESPONDERS = {"Status": "503"}
FLUSH_TIMEOUT_S = 10.0
DEFAULT_JETSTREAM_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ConnectionCallbacks:
    """The functions that report events of a connection to its owner, as the callbacks of nats-py do."""

    on_error: Callable[[Exception], Coroutine[Any, Any, None]]
    on_disconnect: Callable[[], Coroutine[Any, Any, None]]
    on_reconnect: Callable[[], Coroutine[Any, Any, None]]
    on_close: Callable[[], Coroutine[Any, Any, None]]


async def _nothing(*_: object) -> None:
    """Ignore an event of the connection."""


NO_CALLBACKS = ConnectionCallbacks(_nothing, _nothing, _nothing, _nothing)


class MemoryClient(Client):
    """One connection of *server*. `MemoryServer.connect` creates it.

    Attributes:
        delay: Returns the seconds that the next message to this connection takes; None: no time. Messages do not
            overtake each other.
        loses_answer: Returns True if the answer to the next call of JetStream is lost, after the server has acted;
            None: none is lost.

    """

    def __init__(
        self,
        server: "MemoryServer",
        number: int,
        name: str,
        inbox: str,
        callbacks: ConnectionCallbacks,
        *,
        pending_bytes: int,
    ) -> None:
        self.server = server
        self.name = name
        self.options: dict[str, Any] = {}
        self.delay: Callable[[], float] | None = None
        self.loses_answer: Callable[[], bool] | None = None
        self.stats = {
            "in_msgs": 0,
            "out_msgs": 0,
            "in_bytes": 0,
            "out_bytes": 0,
            "reconnects": 0,
            "errors_received": 0,
        }
        self._callbacks = callbacks
        self._number = number
        self._inbox = f"{inbox}.{number}"
        self._numbers = itertools.count(1)
        self._subs: dict[int, MemorySubscription] = {}  # type: ignore[assignment]
        self._replies: dict[str, asyncio.Future[Msg]] = {}
        self._is_connected = True
        self._is_closed = False
        self._is_draining = False
        self._unsent: deque[tuple[Callable[[], None], int]] = deque()
        self._unsent_bytes = 0
        self._pending_bytes = pending_bytes
        self._reachable: asyncio.Event | None = None
        self._arrives_at = 0.0
        self._nuid = self  # type: ignore[assignment]  # of nats.micro: `next` returns the id of a service

    def __repr__(self) -> str:
        return f"<in-memory connection {self.name!r}>"

    def next(self) -> bytes:
        """Return a unique id, as nats-py's nuid does."""
        return f"{self._number}x{next(self._numbers)}".encode()

    async def on_error(self, error: Exception) -> None:
        """Report the error of a callback."""
        await self._callbacks.on_error(error)

    # --- the state of the connection ---------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return self._is_connected and not self._is_closed

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def is_reconnecting(self) -> bool:
        return not self._is_connected and not self._is_closed

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def last_error(self) -> Exception | None:
        return None

    @property
    def max_payload(self) -> int:
        return self.server.max_payload

    @property
    def pending_data_size(self) -> int:
        return self._unsent_bytes

    @property
    def client_id(self) -> int:
        return self._number

    def _can_reach_server(self) -> bool:
        return self.is_connected and not self.server.is_frozen

    async def round_trip(self, timeout_s: float | None) -> None:
        """Let the server be asked; raises nats.errors.TimeoutError if it cannot be reached in time."""
        self.check_open()
        await asyncio.sleep(0 if self.delay is None else self.delay())
        if self._can_reach_server():
            return
        try:
            async with asyncio.timeout(timeout_s):
                while not self._can_reach_server():
                    self.check_open()
                    self._reachable = self._reachable or asyncio.Event()
                    await self._reachable.wait()
        except TimeoutError:
            raise NatsTimeout from None

    async def lose_answer(self, timeout_s: float) -> None:
        """Lose the answer of the server, if that is due: the caller waits in vain."""
        if self.loses_answer is not None and self.loses_answer():
            await asyncio.sleep(timeout_s)
            raise NatsTimeout

    def check_open(self) -> None:
        if self._is_closed:
            raise ConnectionClosedError

    def wake(self) -> None:
        """Wake the calls that wait for the server."""
        if self._reachable is not None and (self._can_reach_server() or self._is_closed):
            self._reachable.set()
            self._reachable = None

    def disconnect(self) -> None:
        """Lose the connection: subscriptions stay without messages, publishes wait, until `reconnect`."""
        if not self.is_connected:
            return
        self._is_connected = False
        for subscription in self._subs.values():
            self.server.remove_subscription(subscription)
        self.server.spawn(self._callbacks.on_disconnect())

    def reconnect(self) -> None:
        """Restore the connection, with its subscriptions, and send what has waited."""
        if self._is_connected or self._is_closed or self.server.is_stopped:
            return
        self._is_connected = True
        self.stats["reconnects"] += 1
        for subscription in self._subs.values():
            self.server.add_subscription(subscription)
        unsent, self._unsent, self._unsent_bytes = self._unsent, deque(), 0
        for send, _ in unsent:
            self.server.submit(send)
        self.server.spawn(self._callbacks.on_reconnect())
        self.wake()

    # --- publish --------------------------------------------------------------------------------------

    def count_out(self, payload: bytes) -> None:
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)

    def send(self, operation: Callable[[], None], size: int = 0) -> None:
        """Let the server perform *operation* now, or after it is reached again."""
        if self._is_connected:
            self.server.submit(operation)
            return
        if self._unsent_bytes + size > self._pending_bytes:
            raise OutboundBufferLimitError
        self._unsent.append((operation, size))
        self._unsent_bytes += size

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        self.check_open()
        if self._is_draining:
            raise ConnectionDrainingError
        check_subject(subject)
        if len(payload) > self.server.max_payload:
            raise MaxPayloadError
        self.count_out(payload)
        data = bytes(payload)
        self.send(lambda: self.server.publish(self, subject, data, reply, headers), len(data))

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,
        old_style: bool = False,  # noqa: ARG002, FBT001, FBT002 - nats-py's
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        reply = f"{self._inbox}.{next(self._numbers)}"
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._replies[reply] = future
        try:
            await self.publish(subject, payload, reply, headers)
            async with asyncio.timeout(timeout):
                message = await future
        except TimeoutError:
            raise NatsTimeout from None
        finally:
            del self._replies[reply]
        if (message.headers or {}).get("Status") == NO_RESPONDERS["Status"]:
            raise NoRespondersError
        return message

    async def flush(self, timeout: int = int(FLUSH_TIMEOUT_S)) -> None:
        await self.round_trip(timeout)

    async def _flush_pending(self, force_flush: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - nats-py's
        await asyncio.sleep(0)

    # --- subscriptions ----------------------------------------------------------------------------------

    def new_inbox(self) -> str:
        return f"{self._inbox}.{next(self._numbers)}"

    async def subscribe(  # type: ignore[override]
        self,
        subject: str,
        queue: str = "",
        cb: Callback | None = None,
        **_: Any,
    ) -> MemorySubscription:
        return self.add_subscription(subject, queue, cb)

    def add_subscription(
        self, subject: str, queue: str = "", callback: Callback | None = None
    ) -> MemorySubscription:
        self.check_open()
        if self._is_draining:
            raise ConnectionDrainingError
        subscription = MemorySubscription(self, next(self._numbers), subject, queue, callback)
        self._subs[subscription._id] = subscription  # noqa: SLF001 - nats-py's name
        if self._is_connected:
            self.server.add_subscription(subscription)
        return subscription

    def detach(self, subscription: MemorySubscription) -> None:
        """Let no further message of the server reach *subscription*."""
        if self._subs.pop(subscription._id, None) is not None and self._is_connected:  # noqa: SLF001 - nats-py's
            self.server.remove_subscription(subscription)

    def remove(self, subscription: MemorySubscription) -> None:
        """End *subscription*; messages that have not been read are lost."""
        self.detach(subscription)
        subscription.end()
        if subscription.ordered is not None:
            self.server.drop_consumer(subscription.ordered)

    def receive(self, subscription: MemorySubscription | None, message: Msg) -> None:
        """Take a message of the server: for *subscription*, or the reply to a request."""
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(message.data)
        if self.delay is None:
            self._hand_over(subscription, message)
            return
        loop = asyncio.get_running_loop()
        self._arrives_at = max(self._arrives_at, loop.time() + self.delay())
        loop.call_at(self._arrives_at, self._hand_over, subscription, message)

    def _hand_over(self, subscription: MemorySubscription | None, message: Msg) -> None:
        if subscription is not None:
            subscription.push(message)
        elif (future := self._replies.get(message.subject)) is not None and not future.done():
            future.set_result(message)

    def waits_for_reply_on(self, subject: str) -> bool:
        return subject in self._replies

    # --- the end ------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """End the subscriptions after their callbacks have handled what has arrived, and close."""
        self.check_open()
        self._is_draining = True
        for subscription in list(self._subs.values()):
            self.detach(subscription)
            await subscription.finish()
            self.remove(subscription)
        await self.close()

    async def close(self) -> None:
        if self._is_closed:
            return
        for subscription in list(self._subs.values()):
            self.remove(subscription)
        self._is_closed = True
        self.server.forget(self)
        self.wake()
        await self._callbacks.on_close()

    def jetstream(self, **opts: Any) -> MemoryJetStream:
        return MemoryJetStream(self, float(opts.get("timeout", DEFAULT_JETSTREAM_TIMEOUT_S)))
