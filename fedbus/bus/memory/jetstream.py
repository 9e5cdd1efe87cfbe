"""The JetStream interface of an in-memory connection, as far as `fedbus.bus` uses it."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, ConsumerInfo, PubAck, RawStreamMsg, StreamConfig, StreamInfo

from fedbus.bus.memory.stream import StoredRecord
from fedbus.bus.memory.subscription import MemorySubscription

if TYPE_CHECKING:
    from fedbus.bus.memory.client import MemoryClient

T = TypeVar("T")


class MemoryJetStream(JetStreamContext):
    """Every call is a request to the server, which has *timeout* to answer."""

    def __init__(self, client: "MemoryClient", timeout: float) -> None:
        self._client = client
        self._timeout = timeout

    async def _ask(self, operation: Callable[[], T]) -> T:
        await self._client.round_trip(self._timeout)
        result = operation()
        await self._client.lose_answer(self._timeout)
        return result

    async def publish(  # type: ignore[override]
        self, subject: str, payload: bytes = b"", *, headers: dict[str, Any] | None = None, **_: Any
    ) -> PubAck:
        self._client.count_out(payload)
        return await self._ask(lambda: self._client.server.store(subject, payload, headers))

    async def add_stream(self, config: StreamConfig | None = None, **params: Any) -> StreamInfo:
        assert config is not None
        assert not params
        return await self._ask(lambda: self._client.server.add_stream(config))

    async def update_stream(self, config: StreamConfig | None = None, **params: Any) -> StreamInfo:
        assert config is not None
        assert not params
        return await self._ask(lambda: self._client.server.update_stream(config))

    async def stream_info(self, name: str, subjects_filter: str | None = None) -> StreamInfo:
        assert subjects_filter is None
        return await self._ask(lambda: self._client.server.stream(name).info())

    async def add_consumer(  # type: ignore[override]
        self, stream: str, config: ConsumerConfig | None = None, **params: Any
    ) -> ConsumerInfo:
        assert config is not None
        assert not params
        return await self._ask(lambda: self._client.server.add_consumer(stream, config).info())

    async def consumer_info(self, stream: str, consumer: str, timeout: float | None = None) -> ConsumerInfo:
        assert timeout is None
        return await self._ask(lambda: self._client.server.consumer(stream, consumer).info())

    async def delete_consumer(self, stream: str, consumer: str) -> bool:
        await self._ask(lambda: self._client.server.delete_consumer(stream, consumer))
        return True

    async def subscribe_bind(  # type: ignore[override]
        self, stream: str, config: ConsumerConfig, consumer: str, **_: Any
    ) -> MemorySubscription:
        found = await self._ask(lambda: self._client.server.consumer(stream, consumer))
        subscription = self._client.add_subscription(config.deliver_subject or "")
        subscription.bind(found)
        return subscription

    async def get_last_msg(self, stream_name: str, subject: str, **_: Any) -> RawStreamMsg:  # type: ignore[override]
        record = await self._ask(lambda: self._client.server.stream(stream_name).last_on(subject))
        return _raw(stream_name, record)

    async def get_msg(self, stream_name: str, seq: int | None = None, **_: Any) -> RawStreamMsg:  # type: ignore[override]
        assert seq is not None
        record = await self._ask(lambda: self._client.server.stream(stream_name).at(seq))
        return _raw(stream_name, record)


def _raw(stream: str, record: StoredRecord) -> RawStreamMsg:
    return RawStreamMsg(
        subject=record.subject,
        seq=record.sequence,
        data=record.data,
        headers=record.headers,
        stream=stream,
        time=datetime.fromtimestamp(record.time_ns / 1e9, UTC),
    )
