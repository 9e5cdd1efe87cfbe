"""Reads the streams of a federation: stored and new messages, current states. Acknowledges nothing."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

import structlog
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import (
    NoRespondersError,
    OutboundBufferLimitError,
    StaleConnectionError,
)
from nats.errors import TimeoutError as NatsTimeout
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RawStreamMsg
from nats.js.errors import NoStreamResponseError, NotFoundError, ServiceUnavailableError

from fedbus.bus import streams
from fedbus.bus.errors import FederationNotFound, NoResponse
from fedbus.bus.nats.cancellation import next_message
from fedbus.bus.nats.connection import Connection
from fedbus.common.retry import RetryBackoff, retry
from fedbus.contracts import subjects
from fedbus.contracts.envelope import (
    DecodeError,
    Envelope,
    decode_message,
)
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import Message
from fedbus.contracts.transition import Transition

ACK_TIMEOUT_S: Final = 2.0
HEARTBEAT_S: Final = 5.0
"""The interval of the server's heartbeats to a reader. It creates its consumer again when it misses two."""
ORDERED_ACK_WAIT_S: Final = 22 * 3600.0
"""As nats-py sets it for consumers without acknowledgements."""
RETRY_S: Final = 0.2
READ_ATTEMPTS: Final = 5
"""Attempts of a read that JetStream does not answer within ACK_TIMEOUT_S, for example on an overloaded machine."""

TRANSIENT_ERRORS: Final = (
    NatsTimeout,
    NoRespondersError,
    NoStreamResponseError,
    OutboundBufferLimitError,
    StaleConnectionError,
    OSError,
)
"""The exceptions of nats-py while the server is unavailable; operations retry on them without limit."""

log = structlog.get_logger("fedbus.bus")

T = TypeVar("T")


@dataclass(frozen=True)
class StoredMessage:
    """A message as stored in a stream."""

    message: Message
    envelope: Envelope
    subject: str
    sequence: int


class StreamReader:
    """Reads the streams of the federation *fed*; needs the permissions of the server side, or of a user."""

    def __init__(self, connected: Connection, fed: FederationId) -> None:
        self.fed = fed
        self._connection = connected
        self._js: JetStreamContext = connected.client.jetstream(timeout=ACK_TIMEOUT_S)

    @asynccontextmanager
    async def read_stream(
        self,
        stream: str,
        wanted: list[str],
        *,
        since: datetime | None = None,
        after: int | None = None,
        whole: bool = False,
    ) -> AsyncIterator[AsyncIterator[StoredMessage]]:
        """Read the messages of *stream* on the *wanted* subjects, stored and new; nothing is acknowledged.

        Starts at the time *since*, after the sequence *after*, or with *whole* at the first stored message; without
        any of these, only new messages.
        """
        config = ConsumerConfig(
            deliver_policy=_deliver_policy(since, after, whole=whole),
            opt_start_time=since,
            opt_start_seq=None if after is None else after + 1,
            filter_subjects=wanted,
        )
        subscription = await _retry_read(stream, lambda: self._subscribe_ordered(stream, wanted, config))
        try:
            yield _iter_stored(self._connection.messages(subscription))
        finally:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()

    async def last_per_subject(self, stream: str, wanted: list[str]) -> list[StoredMessage]:
        """Return the last message of *stream* on each of the *wanted* subjects.

        Raises:
            FederationNotFound: The stream does not exist.
            NoResponse: JetStream does not answer.

        """
        return await _retry_read(stream, lambda: self._read_last_per_subject(stream, wanted))

    async def _read_last_per_subject(self, stream: str, wanted: list[str]) -> list[StoredMessage]:
        config = ConsumerConfig(deliver_policy=DeliverPolicy.LAST_PER_SUBJECT, filter_subjects=wanted)
        subscription = await self._subscribe_ordered(stream, wanted, config)
        messages: list[StoredMessage] = []
        try:
            info = await subscription.consumer_info()
            # Delivered messages may still be in transit, so the total is pending plus delivered.
            delivered = info.delivered.consumer_seq if info.delivered else 0
            for _ in range((info.num_pending or 0) + delivered):
                raw = await next_message(subscription, ACK_TIMEOUT_S)
                with contextlib.suppress(DecodeError):
                    envelope, message = decode_message(raw.subject, raw.headers, raw.data)
                    messages.append(
                        StoredMessage(message, envelope, raw.subject, raw.metadata.sequence.stream)
                    )
        finally:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()
        return messages

    async def last_per_device(self, kind: type[Message]) -> list[StoredMessage]:
        """Return the last message of *kind* of each device; empty if an older federation lacks the stream."""
        assert kind.keeps_last_value, kind.name
        with contextlib.suppress(FederationNotFound):
            return await self.last_per_subject(
                streams.devices_stream(self.fed), [subjects.wildcard_for(self.fed, kind)]
            )
        return []

    async def _subscribe_ordered(
        self, stream: str, wanted: list[str], config: ConsumerConfig
    ) -> JetStreamContext.PushSubscription:
        """Subscribe as nats-py's `subscribe` does, so that the subscription continues after a restart of nats-server.

        nats-py 2.16 then creates the consumer again after the last message that has arrived. It keeps the start time,
        so that the server refuses the consumer; and if no message has arrived, it begins with the first of the stream.
        """
        ordered = config.evolve(
            filter_subjects=wanted,
            deliver_subject=self._connection.client.new_inbox(),
            ack_policy=AckPolicy.NONE,
            ack_wait=ORDERED_ACK_WAIT_S,
            max_deliver=1,
            flow_control=True,
            idle_heartbeat=HEARTBEAT_S,
            num_replicas=1,
            mem_storage=True,
        )
        try:
            consumer = await self._js.add_consumer(stream, config=ordered)
            ordered.opt_start_time = None
            subscription = await self._js.subscribe_bind(
                stream, ordered, consumer.name, ordered_consumer=True, manual_ack=True
            )
        except (NotFoundError, NoStreamResponseError, ServiceUnavailableError):
            raise FederationNotFound(self.fed) from None
        state = subscription._sub._jsi  # noqa: SLF001 - nats-py has no other way
        if state is not None and consumer.delivered is not None:
            state._sseq = consumer.delivered.stream_seq  # noqa: SLF001
        return subscription

    async def sequence_range(self, stream: str) -> tuple[int, int]:
        """Return the sequences of the first and the last message in *stream*.

        Raises:
            FederationNotFound: The stream does not exist.
            NoResponse: JetStream does not answer.

        """
        try:
            state = (await _retry_read(stream, lambda: self._js.stream_info(stream))).state
        except (NotFoundError, NoStreamResponseError, ServiceUnavailableError):
            raise FederationNotFound(self.fed) from None
        return state.first_seq, state.last_seq

    async def list_streams(self) -> dict[str, int] | None:
        """Return the number of messages in each stream of the federation; None if JetStream is disabled."""
        return await streams.list_streams(self._js, self.fed)

    async def current_states(self, kind: str, key: str = ">") -> list[Transition]:
        """Return the last transition of every entity of *kind*, or of one entity."""
        stored = await self.last_transitions(kind, key)
        return [one.message for one in stored if isinstance(one.message, Transition)]

    async def last_transitions(self, kind: str, key: str = ">") -> list[StoredMessage]:
        """Return the last transitions as stored messages, with envelope and sequence."""
        return await self.last_per_subject(
            streams.lifecycle_stream(self.fed), [subjects.lifecycle(self.fed, kind, key)]
        )

    async def last_per_sender(self, kind: type[Message], *, task: str) -> list[Message]:
        """Return the last message of *kind* of each sender."""
        wanted = subjects.wildcard_for(self.fed, kind, task=task)
        return [one.message for one in await self.last_per_subject(streams.events_stream(self.fed), [wanted])]

    async def last_raw_message(self, stream: str, subject: str) -> RawStreamMsg | None:
        """Return the last message of *stream* on *subject*, undecoded. For use within `fedbus.bus`."""

        async def read() -> RawStreamMsg | None:
            try:
                return await self._js.get_last_msg(stream, subject)
            except NotFoundError:
                return None

        errors = (*TRANSIENT_ERRORS, ServiceUnavailableError)
        return await retry_forever(read, errors, "Stream read failed; retrying", subject)


async def retry_forever(
    attempt: Callable[[], Awaitable[T]], errors: tuple[type[Exception], ...], event: str, subject: str
) -> T:
    """Call *attempt* every `RETRY_S` until it succeeds; log *event* at each of *errors*."""

    def report(error: Exception, _: int) -> None:
        log.warning(event, subject=subject, reason=str(error) or type(error).__name__)

    return await retry(
        attempt, on=errors, backoff=RetryBackoff(first_s=RETRY_S, max_s=RETRY_S), on_failure=report
    )


def _deliver_policy(since: datetime | None, after: int | None, *, whole: bool) -> DeliverPolicy:
    if since is not None:
        return DeliverPolicy.BY_START_TIME
    if after is not None:
        return DeliverPolicy.BY_START_SEQUENCE
    return DeliverPolicy.ALL if whole else DeliverPolicy.NEW


async def _retry_read(stream: str, read: Callable[[], Awaitable[T]]) -> T:
    """Retry *read* while JetStream does not answer.

    Raises:
        NoResponse: JetStream did not answer in `READ_ATTEMPTS` attempts.

    """
    for _ in range(READ_ATTEMPTS):
        try:
            return await read()
        except NatsTimeout:
            log.warning(
                "Stream read failed; retrying", stream=stream, reason=f"no reply within {ACK_TIMEOUT_S:g} s"
            )
    reason = f"no reply in {READ_ATTEMPTS} attempts of {ACK_TIMEOUT_S:g} s"
    raise NoResponse(f"a read of {stream}", "nats-server", reason)


async def _iter_stored(messages: AsyncIterator[Msg]) -> AsyncIterator[StoredMessage]:
    async for raw in messages:
        with contextlib.suppress(DecodeError):
            envelope, message = decode_message(raw.subject, raw.headers, raw.data)
            yield StoredMessage(message, envelope, raw.subject, raw.metadata.sequence.stream)
