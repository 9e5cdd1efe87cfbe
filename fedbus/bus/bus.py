"""Typed messages over NATS, each with its trace context.

    publish    publish an event or a command; a durable one is stored in its stream when the call returns
    request    send a request to the server side and wait for its reply; a refusal raises RequestRefused
    serve      answer requests, as a NATS micro service that `nats micro ls` shows
    listen     consume from the agent's durable consumer, from its last acknowledgement
    watch      read a stream, for command line and dashboard; acknowledges nothing

A message that cannot be decoded is stored as a dead letter with the reason; the consumer continues. Reads of streams
are in `stream_reader`, lifecycles in `lifecycles`, blobs in `blobs`.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar, cast

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import (
    ConnectionClosedError,
    NoRespondersError,
    OutboundBufferLimitError,
)
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError
from nats.micro.request import Request as MicroRequest
from nats.micro.service import Service
from opentelemetry.trace import SpanContext

from fedbus.bus import raw_service, streams, tracing
from fedbus.bus.blobs import Blobs
from fedbus.bus.credentials import ANONYMOUS, BusAccess
from fedbus.bus.errors import NoResponse, PublishRefused, RequestRefused
from fedbus.bus.memory.consumer import DeliveredMsg
from fedbus.bus.nats.connection import Connection, open_connection
from fedbus.bus.nats.flush import flush_subscriptions
from fedbus.bus.nats.micro_service import micro_service
from fedbus.bus.stream_reader import TRANSIENT_ERRORS, StoredMessage, StreamReader, retry_forever
from fedbus.common import clock
from fedbus.contracts import subjects
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.catalogue import NO_BLOB_AGENTS, requests_answered_by
from fedbus.contracts.envelope import (
    DecodeError,
    Envelope,
    decode_body,
    decode_message,
    make_envelope,
    pack,
    uuid7,
)
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.message import REFUSED_HEADER, Body, Message, Refused, Request
from fedbus.contracts.state_recall import GetLastTransition, LastTransition
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.contracts.telemetry import DEAD_LETTERS, QUEUE_DEPTH, increment, observable_gauge

SUBSCRIPTION_PENDING_BYTES: Final = 64 * 1024**2
"""Bytes that nats-py buffers in this process for a subscription whose handler is busy."""
DEAD_LETTER_BYTES: Final = 16 * 1024
"""The part of an undecodable message that is stored with the reason."""
CLOCK_SKEW_WARNING_S: Final = 3.0
"""The clock difference from which a warning is logged."""

log = structlog.get_logger("fedbus.bus")

Handler = Callable[[Any], Awaitable[Body]]
ReplyT = TypeVar("ReplyT", bound=Body)


@dataclass(frozen=True)
class Identity:
    """The identity on the bus: an agent of one client or of the server side, in one federation."""

    fed: FederationId
    agent: str
    owner: str = SERVER_SIDE

    @property
    def source(self) -> str:
        return f"fedbus/{self.fed}/{self.agent}/{self.owner}"

    @property
    def is_client(self) -> bool:
        return self.owner not in subjects.RESERVED_OWNERS

    @property
    def blob_holder(self) -> str:
        """The name under which this process offers blobs; unique, so that two processes of one agent do not mix."""
        return f"{self.owner}.{self.agent}_{uuid7()[-12:]}"

    @property
    def inbox(self) -> str:
        """The inbox prefix for replies; one for each agent, so that permissions can exclude the inboxes of others."""
        return subjects.inbox(self.owner, self.agent)

    @property
    def can_transfer_blobs(self) -> bool:
        """True if the agent may send or receive blobs."""
        return self.owner != subjects.USERS and self.agent not in NO_BLOB_AGENTS


@dataclass
class Delivery:
    """A message from a durable consumer, to be acknowledged."""

    message: Message
    envelope: Envelope
    _raw: Msg = field(repr=False)
    consumer: str = ""
    """The source name of the consuming agent: ``fedbus/dev/client-manager/c1``."""

    @property
    def sender_span(self) -> SpanContext | None:
        """The span in which the message was published; None if the sender did not trace."""
        return tracing.span_context_from(self.envelope.trace)

    async def ack(self) -> None:
        with contextlib.suppress(
            NatsError
        ):  # disconnected: NATS redelivers the message, which changes nothing
            await self._raw.ack()

    @contextmanager
    def process(self) -> Iterator[None]:
        """Continue the sender's trace inside the block."""
        with tracing.consumer_span(self.envelope, "process", self.message, self._raw.subject, self.consumer):
            yield


@dataclass(frozen=True)
class ServiceInfo:
    """A NATS micro service that replied to a discovery ping."""

    name: str
    """``fedbus-trainer``"""
    owner: str
    task: str


class Bus(StreamReader):
    """The bus for one agent. Create it with `connect`."""

    def __init__(
        self,
        connected: Connection,
        identity: Identity,
        blobs: Blobs,
        *,
        confined: bool = False,
    ) -> None:
        super().__init__(connected, identity.fed)
        self.identity = identity
        self.blobs = blobs
        self.wait_closed = connected.wait_closed
        """Wait until the connection is closed for good, then raise BusClosed."""
        self._client = connected.client
        self._has_warned_of_skew = False
        self._is_restricted = confined and identity.is_client

    @property
    def source(self) -> str:
        return self.identity.source

    @property
    def is_connected(self) -> bool:
        """True while connected to NATS. While disconnected, missing messages do not mean that a sender has failed."""
        return bool(self._client.is_connected)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str,
        identity: Identity,
        *,
        access: BusAccess = ANONYMOUS,
        options: dict[str, Any] | None = None,
    ) -> AsyncIterator["Bus"]:
        """Connect to the bus for the duration of the block.

        Raises:
            BusUnreachable: No nats-server responds at *url*.
            AccessDenied: The server rejected the connection, or its certificate failed verification.
            InvalidCredentialsFile: The credentials or the CA file is invalid.

        """
        access.check_use(identity.fed, identity.owner if identity.is_client else "")
        name = f"{identity.agent} {identity.owner}"
        all_options = access.connect_options() | (options or {})
        async with (
            open_connection(url, name=name, inbox=identity.inbox, options=all_options) as connected,
            _open_blobs(connected.client, identity) as blobs,
        ):
            yield cls(connected, identity, blobs, confined=access.is_restricted)

    # --- publish -----------------------------------------------------------------------

    async def publish(self, message: Message, *, id: str | None = None) -> None:
        """Publish *message*. A durable message is stored in its stream when this returns; retries have no limit.

        The stream drops a message whose *id* it has already stored. A message that is not durable is dropped if the
        buffer of unsent messages is full, because the connection is lost for long.

        Raises:
            PublishRefused: The stream rejected the message.
            ValueError: The message is too large.

        """
        subject, key, body = subjects.subject_for(self.fed, message), id or uuid7(), pack(message)
        if message.durable:
            with tracing.publish_span(message, subject, "publish", key, self.source):
                await self.publish_to_stream(subject, self._build_headers(message, key), body)
        else:  # a span for each heartbeat would flood the trace; the headers still carry the trace context
            try:
                await self._client.publish(subject, body, headers=self._build_headers(message, key))
            except OutboundBufferLimitError:  # disconnected for days: the agent continues without the bus
                log.debug("Message dropped: the buffer of unsent messages is full", subject=subject)
                return
        tracing.count_message(message, "transmit", len(body))

    def _build_headers(self, message: Message, key: str) -> dict[str, str]:
        return make_envelope(
            message, source=self.source, id=key, trace=tracing.current_trace_headers()
        ).headers()

    async def publish_to_stream(self, subject: str, headers: Mapping[str, str], body: bytes) -> int:
        """Store *body* in its stream, across reconnects, and return its sequence.

        The stream drops a repeated ``Nats-Msg-Id``.

        Raises:
            PublishRefused: The stream rejected the message.

        """

        async def publish() -> int:
            try:
                return int((await self._js.publish(subject, body, headers=dict(headers))).seq)
            except APIError as error:
                raise PublishRefused(subject, f"{error.description} ({error.err_code})") from error

        return await retry_forever(publish, TRANSIENT_ERRORS, "Publish not acknowledged; retrying", subject)

    # --- request and reply ----------------------------------------------------------------

    async def request(self, request: Request[ReplyT], *, timeout_s: float = 5.0) -> ReplyT:
        """Send *request* and return its reply.

        Raises:
            RequestRefused: The reply is a refusal.
            NoResponse: No agent serves the request, or the reply did not arrive in time.

        """
        subject, key, body = subjects.subject_for(self.fed, request), uuid7(), pack(request)
        with tracing.publish_span(request, subject, "request", key, self.source):
            headers = self._build_headers(request, key)
            tracing.count_message(request, "transmit", len(body))
            try:
                reply = await self._client.request(subject, body, timeout=timeout_s, headers=headers)
            except NoRespondersError:
                raise NoResponse(request.name, request.responder, "no agent serves it") from None
            except (*TRANSIENT_ERRORS, ConnectionClosedError):
                raise NoResponse(
                    request.name, request.responder, f"no reply within {timeout_s:g} s"
                ) from None
            return _parse_reply(request, reply)

    @asynccontextmanager
    async def serve(
        self, handlers: Mapping[type[Request[Body]], Handler], *, task: str, version: str
    ) -> AsyncIterator[None]:
        """Answer requests of *task* for the duration of the block. Every request of the agent needs a handler."""
        assert set(handlers) == set(requests_answered_by(self.identity.agent)), (
            "Every request of an agent needs a handler."
        )
        async with self._open_service(task, version) as service:
            for kind, handler in handlers.items():
                await service.add_endpoint(
                    name=kind.name.replace("_", "-"),
                    subject=subjects.wildcard_for(self.fed, kind, task=task),
                    handler=_make_endpoint(handler, self.source),
                )
            await flush_subscriptions(self._client)  # from here on no request is lost
            yield

    @asynccontextmanager
    async def serve_raw(
        self,
        name: str,
        endpoints: Mapping[str, tuple[str, raw_service.RawHandler]],
        *,
        task: str,
        version: str,
    ) -> AsyncIterator[None]:
        """Answer raw requests, bytes in and bytes out, for the duration of the block; see `fedbus.bus.raw_service`."""
        description = f"{name} of {self.identity.owner}, task {task} in federation {self.fed}"
        metadata = {"task": task, "federation": self.fed, "owner": self.identity.owner}
        async with raw_service.serve_raw(
            self._client, name, endpoints, version=version, description=description, metadata=metadata
        ):
            yield

    # --- discovery and consumers -------------------------------------------------------------

    @asynccontextmanager
    async def advertise_service(self, *, task: str, version: str) -> AsyncIterator[None]:
        """Make the agent visible to `nats micro ls` for the duration of the block, even if it answers no request."""
        if not self._is_restricted:
            self._warn_on_clock_skew(await self.measure_clock_skew_s())
        if requests_answered_by(self.identity.agent):  # `serve` already advertises the agent
            yield
            return
        async with self._open_service(task, version):
            yield

    def _open_service(self, task: str, version: str) -> AbstractAsyncContextManager[Service]:
        owner = f" of {self.identity.owner}" if self.identity.is_client else ""
        return micro_service(
            self._client,
            name=f"fedbus-{self.identity.agent}",
            version=version,
            description=f"{self.identity.agent}{owner}, task {task} in federation {self.fed}",
            metadata={"task": task, "federation": self.fed, "owner": self.identity.owner},
        )

    async def discover_agents(self, *, within_s: float = 1.0) -> list[ServiceInfo]:
        """Return the agents of the federation that reply to a ping within *within_s*. Devices have no permission."""
        inbox, services = self._client.new_inbox(), []
        async with self.subscribe(inbox) as replies:
            await self._client.publish("$SRV.PING", reply=inbox)
            with contextlib.suppress(NatsError, TimeoutError):
                async with asyncio.timeout(within_s):
                    while reply := (await replies.next_msg(timeout=within_s)).data:  # empty: no responders
                        services.append(json.loads(reply))
        known = [(one["name"], one.get("metadata") or {}) for one in services]
        return [
            ServiceInfo(name, metadata["owner"], metadata["task"])
            for name, metadata in known
            if metadata.get("federation") == self.fed
        ]

    async def create_streams(self) -> None:
        """Create the streams of the federation. Only the server side has the permission."""
        await streams.create_streams(self._js, self.fed)

    async def create_client_consumer(self, agent: AgentName, *, task: str, client: str) -> str:
        """Create the durable consumer of a client's *agent*. Only the server side has the permission."""
        return await streams.create_consumer(
            self._js, self.fed, agent, task=task, owner=client, client=client
        )

    async def delete_consumer(self, agent: AgentName, *, task: str) -> None:
        """Delete the server side's consumer of *agent* with its pending messages."""
        await streams.delete_consumer(self._js, self.fed, agent, task=task, owner=SERVER_SIDE)

    @asynccontextmanager
    async def consume(self, agent: AgentName, *, task: str) -> AsyncIterator[AsyncIterator[Delivery]]:
        """Consume the messages of *agent*'s durable consumer, in order; NATS redelivers what is not acknowledged.

        The server side creates a client's consumer when the client enrolls; before that no message arrives.
        """
        owner = self.identity.owner
        if not self.identity.is_client:
            await streams.create_consumer(self._js, self.fed, agent, task=task, owner=owner)
        subject = subjects.deliver(self.fed, owner, f"{task}.{agent}")
        async with self.subscribe(subject) as subscription:
            with observable_gauge(
                QUEUE_DEPTH, lambda: [(subscription.pending_msgs, {"fedbus.queue": agent})]
            ):
                yield self._iter_deliveries(subscription, agent)

    async def _iter_deliveries(self, subscription: Subscription, agent: AgentName) -> AsyncIterator[Delivery]:
        async for raw in self._connection.messages(subscription):
            try:
                envelope, message = _decode(raw)
            except DecodeError as error:
                await self._dead_letter(raw, agent, error)
            else:
                tracing.record_receive(message, envelope, raw)
                yield Delivery(message, envelope, raw, f"{self.source}/{agent}")

    @asynccontextmanager
    async def subscribe_ephemeral(
        self, kind: type[Message], *, task: str
    ) -> AsyncIterator[AsyncIterator[Message]]:
        """Subscribe to messages of one *kind*, durable or not, from now on."""
        async with self.subscribe(subjects.wildcard_for(self.fed, kind, task=task)) as subscription:
            yield _iter_messages(self._connection.messages(subscription))

    @asynccontextmanager
    async def subscribe(self, subject: str) -> AsyncIterator[Subscription]:
        """Subscribe to *subject*, undecoded; no message is lost once the block begins. For use within `fedbus.bus`."""
        subscription = await self._client.subscribe(subject, pending_bytes_limit=SUBSCRIPTION_PENDING_BYTES)
        await flush_subscriptions(self._client)
        try:
            yield subscription
        finally:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()

    async def _dead_letter(self, raw: Msg, agent: AgentName, reason: DecodeError) -> None:
        """Store an undecodable message as a dead letter; redelivery cannot fix it."""
        log.warning("Message dead-lettered", subject=raw.subject, reason=str(reason))
        increment(DEAD_LETTERS)
        headers = {"fedbus-reason": " ".join(str(reason).split())[:500], "fedbus-subject": raw.subject}
        dead = subjects.dead_letter(self.fed, self.identity.owner, agent)
        await self.publish_to_stream(dead, headers, raw.data[:DEAD_LETTER_BYTES])
        await raw.term()

    # --- clocks and last transitions -----------------------------------------------------------

    async def measure_clock_skew_s(self, task: str = "") -> float | None:
        """Return by how many seconds this machine's clock is ahead of the NATS server's; None without a reply.

        A client with credentials has no permission to query the NATS server and queries the server side of *task*
        instead. The error is at most half of the round-trip time.
        """
        asked_at = clock.now()
        if self._is_restricted:
            request = GetLastTransition.model_validate(
                {"task": task, "client": self.identity.owner, "kind": "client"}
            )
            try:
                return _clock_skew_s(asked_at, (await self.request(request)).answered_at)
            except (NoResponse, RequestRefused):
                return None
        try:
            raw = await self._client.request(f"$JS.API.STREAM.INFO.{streams.events_stream(self.fed)}")
        except NatsError:
            return None
        if not (timestamp := json.loads(raw.data).get("ts")):
            return None
        return _clock_skew_s(asked_at, datetime.fromisoformat(timestamp).timestamp())

    def _warn_on_clock_skew(self, ahead_s: float | None) -> None:
        """Log a large skew, once: deadlines, credentials and traces compare several clocks."""
        if ahead_s is not None and abs(ahead_s) > CLOCK_SKEW_WARNING_S and not self._has_warned_of_skew:
            self._has_warned_of_skew = True
            advice = "set the clock of this machine or of the server"
            log.warning("Clock skew against the NATS server", ahead_s=round(ahead_s, 1), advice=advice)

    async def last_on_subject(self, subject: str) -> StoredMessage | None:
        """Return the last message of the lifecycle stream on *subject*; retries without limit while disconnected."""
        if self._is_restricted:
            return await self._request_last_transition(subject)
        raw = await self.last_raw_message(streams.lifecycle_stream(self.fed), subject)
        if raw is None:
            return None
        envelope, message = decode_message(subject, raw.headers, raw.data or b"")
        return StoredMessage(message, envelope, subject, int(raw.seq or 0))

    async def _request_last_transition(self, subject: str) -> StoredMessage | None:
        """Request the last message from the server side, for a client with credentials: see `state_recall`."""
        *_, kind, client, task = subject.split(".")
        request = GetLastTransition.model_validate({"task": task, "client": client, "kind": kind})

        async def send() -> LastTransition:
            asked_at = clock.now()
            reply = await self.request(request)
            self._warn_on_clock_skew(_clock_skew_s(asked_at, reply.answered_at))
            return reply

        last = await retry_forever(send, (NoResponse, RequestRefused), "State read failed; retrying", subject)
        if not last.sequence:
            return None
        envelope, message = decode_message(subject, last.headers, last.body)
        return StoredMessage(message, envelope, subject, last.sequence)

    async def answer_last_transition(self, request: GetLastTransition) -> LastTransition:
        """Answer a client's request for its last transition. For the server side."""
        stream = streams.lifecycle_stream(self.fed)
        try:
            raw = await self._js.get_last_msg(
                stream, subjects.lifecycle(self.fed, request.kind, f"{request.client}.{request.task}")
            )
        except NotFoundError:
            return LastTransition(answered_at=clock.time_s())
        return LastTransition(
            sequence=int(raw.seq or 0),
            headers=dict(raw.headers or {}),
            body=raw.data or b"",
            answered_at=clock.time_s(),
        )


@asynccontextmanager
async def _open_blobs(client: Client, identity: Identity) -> AsyncIterator[Blobs]:
    """Open the blob transfer; agents without blob permission do not subscribe to blob subjects."""
    if identity.can_transfer_blobs:
        async with Blobs.open(client, identity.fed, identity.blob_holder) as blobs:
            yield blobs
    else:
        yield Blobs(client, identity.fed, identity.blob_holder)


def _clock_skew_s(asked_at: datetime, answered_s: float) -> float | None:
    """Return how far the local clock is ahead of a clock that replied *answered_s*; None if it replied no time."""
    now_s = clock.now().timestamp()
    return (asked_at.timestamp() + now_s) / 2 - answered_s if answered_s else None


def _decode(raw: Msg) -> tuple[Envelope, Message]:
    """Decode a message of a consumer; raises DecodeError. In memory, all receivers of a message share the result."""
    if isinstance(raw, DeliveredMsg):
        return raw.decode(decode_message)
    return decode_message(raw.subject, raw.headers, raw.data)


def _parse_reply(request: Request[ReplyT], reply: Msg) -> ReplyT:
    if reply.headers and REFUSED_HEADER in reply.headers:
        refused = decode_body(Refused, reply.data)
        raise RequestRefused(request.name, refused.reason, kind=refused.kind)
    if reply.headers and "Nats-Service-Error" in reply.headers:
        raise RequestRefused(
            request.name, f"internal error in the {request.responder}: {reply.headers['Nats-Service-Error']}"
        )
    return decode_body(cast("type[ReplyT]", request.reply_type), reply.data)


def _make_endpoint(handler: Handler, source: str) -> Callable[[MicroRequest], Awaitable[None]]:
    """Wrap *handler* of the agent *source* as a micro endpoint. An invalid request gets a refusal."""

    async def answer(raw: MicroRequest) -> None:
        if not raw._msg.reply.startswith(f"{subjects.INBOX}."):  # noqa: SLF001 - no public way in nats-py 2.16
            log.warning("Dropping request: reply subject is not an inbox", subject=raw.subject)
            return  # else a requester could use our permissions to publish to a subject it may not use
        try:
            envelope, message = decode_message(raw.subject, raw.headers, raw.data)
        except DecodeError as error:
            await raw.respond(pack(Refused(reason=str(error))), headers={REFUSED_HEADER: "unreadable"})
            return
        tracing.count_message(message, "receive", len(raw.data))
        with tracing.consumer_span(envelope, "answer", message, raw.subject, source):
            body = await handler(message)
        await raw.respond(
            pack(body), headers={REFUSED_HEADER: "refused"} if isinstance(body, Refused) else {}
        )

    return answer


async def _iter_messages(messages: AsyncIterator[Msg]) -> AsyncIterator[Message]:
    async for raw in messages:
        with contextlib.suppress(DecodeError):  # no consumer waits for this message, so it is dropped
            yield decode_message(raw.subject, raw.headers, raw.data)[1]
