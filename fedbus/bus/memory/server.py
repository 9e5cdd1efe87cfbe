"""The in-memory server: connections, routes, streams."""

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, PubAck, StreamConfig, StreamInfo
from nats.js.errors import APIError, BadRequestError, NoStreamResponseError, NotFoundError

from fedbus.bus.memory.client import NO_CALLBACKS, NO_RESPONDERS, ConnectionCallbacks, MemoryClient
from fedbus.bus.memory.consumer import DeliveredMsg, PushConsumer
from fedbus.bus.memory.stream import MemoryStream, StoredRecord
from fedbus.bus.memory.subject_index import SubjectIndex, check_subject
from fedbus.bus.memory.subscription import MemorySubscription
from fedbus.common import clock

SCHEME: Final = "memory://"
MAX_PAYLOAD_BYTES: Final = 8 * 1024**2
PENDING_BYTES: Final = 64 * 1024**2
RECONNECT_S: Final = 0.1
"""A connection is restored at a random time within this after the server has started again."""
STREAM_INFO: Final = "$JS.API.STREAM.INFO."
INBOX: Final = "_INBOX."


class MemoryServer:
    """A server at ``memory://NAME``, for the duration of a block.

    Args:
        name: The name in its URL; no other server of the process may have it at the same time.
        history: The number of messages that a stream keeps on one subject at most, so that memory stays bounded over
            hours of virtual time; None: the limit of the stream's config. Consumers get all messages nevertheless.

    """

    _servers: ClassVar[dict[str, "MemoryServer"]] = {}

    def __init__(self, name: str, *, history: int | None = None) -> None:
        self.url = f"{SCHEME}{name}"
        self.max_payload = MAX_PAYLOAD_BYTES
        self.is_frozen = False
        self.is_stopped = False
        self.streams: dict[str, MemoryStream] = {}
        self.on_stored: Callable[[StoredRecord], None] | None = None
        """Called with each message that a stream stores, in order."""
        self._history = history
        self._clients: dict[int, MemoryClient] = {}
        self._numbers = itertools.count(1)
        self._routes: SubjectIndex[MemorySubscription] = SubjectIndex()
        self._consumers: dict[str, list[PushConsumer]] = {}
        """By delivery subject."""
        self._stream_of: dict[str, MemoryStream | None] = {}
        self._stream_index: SubjectIndex[MemoryStream] = SubjectIndex()
        self._held: deque[Callable[[], None]] = deque()
        """What connections have sent while the server was frozen."""
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        assert self.url not in self._servers, f"a server at {self.url} runs already"
        self._servers[self.url] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._servers[self.url]
        for stream in self.streams.values():
            for consumer in stream.consumers.values():
                consumer.close()

    @classmethod
    def at(cls, url: str) -> "MemoryServer | None":
        """Return the server that runs at *url*."""
        server = cls._servers.get(url)
        return None if server is None or server.is_stopped else server

    # --- connections ------------------------------------------------------------------------------------

    def connect(
        self,
        name: str = "",
        inbox: str = "_INBOX.raw",
        callbacks: ConnectionCallbacks = NO_CALLBACKS,
        *,
        pending_bytes: int = PENDING_BYTES,
    ) -> MemoryClient:
        number = next(self._numbers)
        client = MemoryClient(self, number, name, inbox, callbacks, pending_bytes=pending_bytes)
        self._clients[number] = client
        return client

    @property
    def clients(self) -> list[MemoryClient]:
        """The open connections, in the order in which they were opened."""
        return list(self._clients.values())

    def forget(self, client: MemoryClient) -> None:
        self._clients.pop(client.client_id, None)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a callback of a connection."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- faults -------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Lose all connections, as if the server was killed. Streams and consumers stay, as on disk."""
        self.is_stopped = True
        for client in self.clients:
            client.disconnect()

    def start(self) -> None:
        """Accept connections again; those that were lost return within `RECONNECT_S`."""
        self.is_stopped = False
        loop = asyncio.get_running_loop()
        for client in self.clients:
            loop.call_later(clock.uniform(0, RECONNECT_S), client.reconnect)

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """Answer nothing until the block ends; then handle what has arrived."""
        self.is_frozen = True
        try:
            yield
        finally:
            self.is_frozen = False
            held, self._held = self._held, deque()
            for operation in held:
                operation()
            for client in self.clients:
                client.wake()

    # --- messages -----------------------------------------------------------------------------------------

    def submit(self, operation: Callable[[], None]) -> None:
        """Perform what a connection has sent, now or after the server is frozen no more."""
        if self.is_frozen:
            self._held.append(operation)
        else:
            operation()

    def publish(
        self, sender: MemoryClient, subject: str, data: bytes, reply: str, headers: dict[str, str] | None
    ) -> None:
        """Route a message to its subscribers, and store it if a stream takes its subject."""
        if subject.startswith("$"):
            if subject.startswith(STREAM_INFO):
                self._answer_stream_info(sender, subject, reply)
                return
        elif subject.startswith(INBOX) and (asker := self._asker(subject)) is not None:
            asker.receive(None, self._message(asker, subject, data, reply, headers))
            return
        received = self._route(subject, data, reply, headers)
        if (stream := self._stream_for(subject)) is not None:
            with suppress(APIError):  # without a request for an acknowledgement, the sender does not get it
                self._store_in(stream, subject, data, headers)
        elif reply and not received:
            self._report_no_responders(sender, reply)

    def _report_no_responders(self, sender: MemoryClient, reply: str) -> None:
        if sender.waits_for_reply_on(reply):
            sender.receive(None, self._message(sender, reply, b"", "", dict(NO_RESPONDERS)))
        else:
            self._route(reply, b"", "", dict(NO_RESPONDERS))

    def _asker(self, subject: str) -> MemoryClient | None:
        """Return the connection whose request waits for a reply on *subject*."""
        number = subject.rsplit(".", 2)[1]
        client = self._clients.get(int(number)) if number.isdigit() else None
        return (
            client
            if client is not None and client.waits_for_reply_on(subject) and client.is_connected
            else None
        )

    def _message(
        self, client: MemoryClient, subject: str, data: bytes, reply: str, headers: dict[str, str] | None
    ) -> Msg:
        return Msg(_client=client, subject=subject, reply=reply, data=data, headers=headers)

    def _route(self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> bool:
        """Hand a message to the subscribers; False if there are none."""
        found = self._subscribers(subject)
        for one in found:
            client = one.client
            client.receive(one, self._message(client, subject, data, reply, headers))
        return bool(found)

    def _subscribers(self, subject: str) -> list[MemorySubscription]:
        """Return the subscriptions to *subject*, with one of each queue group."""
        found = self._routes.match(subject)
        if not any(one.queue for one in found):
            return found
        self._turn += 1
        groups: dict[str, list[MemorySubscription]] = {}
        for one in found:
            if one.queue:
                groups.setdefault(one.queue, []).append(one)
        chosen = [members[self._turn % len(members)] for members in groups.values()]
        return [one for one in found if not one.queue] + chosen

    def add_subscription(self, subscription: MemorySubscription) -> None:
        self._routes.add(subscription.subject, subscription)
        for consumer in self._consumers.get(subscription.subject, ()):
            consumer.pump()

    def remove_subscription(self, subscription: MemorySubscription) -> None:
        self._routes.remove(subscription.subject, subscription)

    def _answer_stream_info(self, sender: MemoryClient, subject: str, reply: str) -> None:
        name = subject.removeprefix(STREAM_INFO)
        answer: dict[str, Any] = {"ts": clock.now().isoformat().replace("+00:00", "Z")}
        if name not in self.streams:
            answer["error"] = {"code": 404}
        sender.receive(None, self._message(sender, reply, json.dumps(answer).encode(), "", None))

    # --- JetStream ----------------------------------------------------------------------------------------

    def has_subscriber(self, subject: str) -> bool:
        return self._routes.has_exact(subject)

    def deliver(self, consumer: PushConsumer, record: StoredRecord, times: int) -> None:
        """Hand a message of *consumer* to its subscribers."""
        for one in self._routes.exact(consumer.subject):
            client = one.client
            client.receive(one, DeliveredMsg(client, consumer, record, times, consumer.delivered))

    def _stream_for(self, subject: str) -> MemoryStream | None:
        if subject not in self._stream_of:
            self._stream_of[subject] = next(iter(self._stream_index.match(subject)), None)
        return self._stream_of[subject]

    def store(self, subject: str, data: bytes, headers: dict[str, str] | None) -> PubAck:
        """Store a message in the stream of its subject, and hand it to subscribers of the subject.

        Raises:
            NoStreamResponseError: No stream takes *subject*.
            APIError: The stream rejects it.

        """
        check_subject(subject)
        if (stream := self._stream_for(subject)) is None:
            raise NoStreamResponseError
        acknowledged = self._store_in(stream, subject, data, headers)
        self._route(subject, data, "", headers)
        return acknowledged

    def _store_in(
        self, stream: MemoryStream, subject: str, data: bytes, headers: dict[str, str] | None
    ) -> PubAck:
        acknowledged = stream.store(subject, data, headers)
        if self.on_stored is not None and not acknowledged.duplicate:
            self.on_stored(stream.records[acknowledged.seq])
        return acknowledged

    def stream(self, name: str) -> MemoryStream:
        """Return a stream; raises NotFoundError."""
        if name not in self.streams:
            raise NotFoundError(code=404, description="stream not found", err_code=10059)
        return self.streams[name]

    def add_stream(self, config: StreamConfig) -> StreamInfo:
        """Create a stream; raises BadRequestError if it exists with another config."""
        name = config.name or ""
        if (present := self.streams.get(name)) is None:
            present = self.streams[name] = MemoryStream(replace(config), self, history=self._history)
            self._index_stream(present)
        elif present.config != config:
            raise BadRequestError(
                code=400,
                description="stream name already in use with a different configuration",
                err_code=10058,
            )
        return present.info()

    def update_stream(self, config: StreamConfig) -> StreamInfo:
        stream = self.stream(config.name or "")
        for pattern in stream.config.subjects or []:
            self._stream_index.remove(pattern, stream)
        stream.config = replace(config)
        self._index_stream(stream)
        return stream.info()

    def _index_stream(self, stream: MemoryStream) -> None:
        self._stream_of.clear()
        for pattern in stream.config.subjects or []:
            self._stream_index.add(pattern, stream)

    def add_consumer(self, stream: str, config: ConsumerConfig) -> PushConsumer:
        found = self.stream(stream)
        before = len(found.consumers)
        consumer = found.add_consumer(config)
        if len(found.consumers) > before:
            self._consumers.setdefault(consumer.subject, []).append(consumer)
        return consumer

    def consumer(self, stream: str, name: str) -> PushConsumer:
        """Return a consumer; raises NotFoundError."""
        consumers = self.stream(stream).consumers
        if name not in consumers:
            raise NotFoundError(code=404, description="consumer not found", err_code=10014)
        return consumers[name]

    def delete_consumer(self, stream: str, name: str) -> None:
        """Delete a consumer; raises NotFoundError."""
        self._forget_consumer(self.stream(stream).delete_consumer(name))

    def drop_consumer(self, consumer: PushConsumer) -> None:
        """Delete the consumer of a subscription that has ended."""
        if consumer.stream.consumers.get(consumer.name) is consumer:
            consumer.stream.delete_consumer(consumer.name)
            self._forget_consumer(consumer)

    def _forget_consumer(self, consumer: PushConsumer) -> None:
        self._consumers[consumer.subject].remove(consumer)
        if not self._consumers[consumer.subject]:
            del self._consumers[consumer.subject]
