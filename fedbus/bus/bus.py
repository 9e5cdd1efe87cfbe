"""Typed messages over NATS, each carrying its trace.

    publish    an event or command; when it returns, the stream has it
    request    a question to the server side, and its answer; a refusal is an exception of its own
    serve      the other end of it, as a NATS micro service that `nats micro ls` shows
    listen     what the agent's durable consumer holds, from where it left off
    watch      what a stream holds and will hold, for people and dashboards; acknowledges nothing

What cannot be read is set aside as a dead letter with the reason; nobody dies of it. How
lifecycles move stands in `lives`, how weights travel in `blobs`.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import (
    ConnectionClosedError,
    NoRespondersError,
    OutboundBufferLimitError,
    StaleConnectionError,
)
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, DeliverPolicy, RawStreamMsg
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError, ServiceUnavailableError
from nats.micro.request import Request as MicroRequest
from nats.micro.service import Service
from opentelemetry.trace import SpanContext

from fedbus.bus import raw_service, streams, tracing
from fedbus.bus.blobs import Blobs
from fedbus.bus.credentials import ANONYMOUS, BusAccess
from fedbus.bus.errors import FederationNotFound, NoResponse, PublishRefused, RequestRefused
from fedbus.bus.nats.cancellation import next_message
from fedbus.bus.nats.connection import Connection, open_connection
from fedbus.bus.nats.flush import flush_subscriptions
from fedbus.bus.nats.micro_service import micro_service
from fedbus.common.retry import RetryBackoff, retry
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
from fedbus.contracts.transition import Transition

ACK_TIMEOUT_S: Final = 2.0
RETRY_S: Final = 0.2
READ_ATTEMPTS: Final = 5
"""How often a read is tried that JetStream does not answer within ACK_TIMEOUT_S, as on a machine that is overloaded."""
SUBSCRIPTION_PENDING_BYTES: Final = 64 * 1024**2
"""What may wait in this process for a listener that is busy."""
DEAD_LETTER_BYTES: Final = 16 * 1024
"""How much of an unreadable message is kept with the reason."""
CLOCK_SKEW_WARNING_S: Final = 3.0
"""By so much two clocks may differ before anybody is told."""

TRANSIENT_ERRORS: Final = (
    NatsTimeout,
    NoRespondersError,
    NoStreamResponseError,
    OutboundBufferLimitError,
    StaleConnectionError,
    OSError,
)
"""What nats-py raises while the server is gone or not up again: try again, for as long as it takes."""

log = structlog.get_logger("fedbus.bus")

T = TypeVar("T")
Handler = Callable[[Any], Awaitable[Body]]


@dataclass(frozen=True)
class Identity:
    """Who speaks: an agent, of one client or of the server side, in one federation."""

    fed: FederationId
    agent: str
    owner: str = SERVER_SIDE

    @property
    def source(self) -> str:
        return f"fedbus/{self.fed}/{self.agent}/{self.owner}"

    @property
    def of_client(self) -> bool:
        return self.owner not in subjects.RESERVED_OWNERS

    @property
    def holder(self) -> str:
        """Under which name blobs are given out, one for each process: two of one name never mix."""
        return f"{self.owner}.{self.agent}_{uuid7()[-12:]}"

    @property
    def inbox(self) -> str:
        """Where answers go: a place of its own, so that nobody is permitted to read another's."""
        return subjects.inbox(self.owner, self.agent)

    @property
    def can_transfer_blobs(self) -> bool:
        """Whether it may give or take blobs at all."""
        return self.owner != subjects.USERS and self.agent not in NO_BLOB_AGENTS


@dataclass
class Delivery:
    """A message that a durable consumer handed over, until it is acknowledged."""

    message: Message
    envelope: Envelope
    _raw: Msg = field(repr=False)
    consumer: str = ""
    """The agent whose consumer it is, in full: ``fedbus/dev/client-manager/c1``."""

    @property
    def sender_span(self) -> SpanContext | None:
        """The span in which it was said, where its sender traced anything."""
        return tracing.span_context_from(self.envelope.trace)

    async def ack(self) -> None:
        with contextlib.suppress(NatsError):  # disconnected: NATS redelivers it, and it is dropped then
            await self._raw.ack()

    @contextmanager
    def process(self) -> Iterator[None]:
        """What is done inside continues the trace of the sender."""
        with tracing.consumer_span(self.envelope, "process", self.message, self._raw.subject, self.consumer):
            yield


@dataclass(frozen=True)
class StoredMessage:
    """A message as a watcher sees it."""

    message: Message
    envelope: Envelope
    subject: str
    sequence: int


@dataclass(frozen=True)
class ServiceInfo:
    """A NATS micro service that says that it is there."""

    name: str
    """``fedbus-trainer``"""
    owner: str
    task: str


class Bus:
    """The bus as one agent sees it. Make one with `connect`."""

    def __init__(
        self,
        connected: Connection,
        identity: Identity,
        blobs: Blobs,
        *,
        confined: bool = False,
    ) -> None:
        self.identity = identity
        self.blobs = blobs
        self.lost = connected.lost
        """Wait for the end of the connection, which raises BusClosed."""
        self._connection = connected
        self._client = client = connected.client
        self._has_warned_of_skew = False
        self._is_restricted = confined and identity.of_client
        self._js: JetStreamContext = client.jetstream(timeout=ACK_TIMEOUT_S)

    @property
    def fed(self) -> FederationId:
        return self.identity.fed

    @property
    def source(self) -> str:
        return self.identity.source

    @property
    def connected(self) -> bool:
        """While it is not, silence says nothing about anybody."""
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
        """The bus for as long as the block runs; raises BusUnreachable, AccessDenied and AccessUnusable."""
        access.check_use(identity.fed, identity.owner if identity.of_client else "")
        name = f"{identity.agent} {identity.owner}"
        all_options = access.options() | (options or {})
        async with (
            open_connection(url, name=name, inbox=identity.inbox, options=all_options) as connected,
            _open_blobs(connected.client, identity) as blobs,
        ):
            yield cls(connected, identity, blobs, confined=access.confined)

    # --- saying ------------------------------------------------------------------------

    async def publish(self, message: Message, *, id: str | None = None) -> None:
        """Publish *message*. A durable one is stored in the stream when this returns, after any number of retries.

        *id*: a key under which the stream drops a repeat. Raises PublishRefused where the stream says no,
        and ValueError for a message that is too large.
        """
        subject, key, body = subjects.subject_for(self.fed, message), id or uuid7(), pack(message)
        if message.durable:
            with tracing.publish_span(message, subject, "publish", key, self.source):
                await self.store(subject, self._build_headers(message, key), body)
        else:  # a heartbeat is no step of anything: it carries the trace and makes no span
            await self._client.publish(subject, body, headers=self._build_headers(message, key))
        tracing.count_message(message, "transmit", len(body))

    def _build_headers(self, message: Message, key: str) -> dict[str, str]:
        return make_envelope(
            message, source=self.source, id=key, trace=tracing.current_trace_headers()
        ).headers()

    async def store(self, subject: str, headers: Mapping[str, str], body: bytes) -> int:
        """Put *body* in its stream, through every reconnect; the sequence it got.

        A repeat is dropped by its ``Nats-Msg-Id``. Raises PublishRefused where the stream says no.
        """

        async def publish() -> int:
            try:
                return int((await self._js.publish(subject, body, headers=dict(headers))).seq)
            except APIError as error:
                raise PublishRefused(subject, f"{error.description} ({error.err_code})") from error

        return await _retry(publish, TRANSIENT_ERRORS, "Publish not acknowledged; retrying", subject)

    # --- asking and answering -------------------------------------------------------------

    async def request(self, request: Request, *, timeout_s: float = 5.0) -> Any:
        """The answer to *request*, of the class that it declares; raises RequestRefused and NoAnswer."""
        subject, key, body = subjects.subject_for(self.fed, request), uuid7(), pack(request)
        with tracing.publish_span(request, subject, "request", key, self.source):
            headers = self._build_headers(request, key)
            tracing.count_message(request, "transmit", len(body))
            try:
                reply = await self._client.request(subject, body, timeout=timeout_s, headers=headers)
            except NoRespondersError:
                raise NoResponse(request.word, request.server, "no agent serves it") from None
            except (*TRANSIENT_ERRORS, ConnectionClosedError):
                raise NoResponse(request.word, request.server, f"no reply within {timeout_s:g} s") from None
            return _parse_reply(request, reply)

    @asynccontextmanager
    async def serve(
        self, handlers: Mapping[type[Request], Handler], *, task: str, version: str
    ) -> AsyncIterator[None]:
        """Answer requests of *task* for as long as the block runs. All requests of the agent need a handler."""
        assert set(handlers) == set(requests_answered_by(self.identity.agent)), (
            "each request needs its handler"
        )
        async with self._open_service(task, version) as service:
            for kind, handler in handlers.items():
                await service.add_endpoint(
                    name=kind.word.replace("_", "-"),
                    subject=subjects.wildcard_for(self.fed, kind, task=task),
                    handler=_make_endpoint(handler, self.source),
                )
            await flush_subscriptions(self._client)  # from here on no request is missed
            yield

    @asynccontextmanager
    async def offer(
        self,
        name: str,
        endpoints: Mapping[str, tuple[str, raw_service.RawHandler]],
        *,
        task: str,
        version: str,
    ) -> AsyncIterator[None]:
        """Answer plain questions, bytes for bytes, for as long as the block runs: see `fedbus.bus.raw_service`."""
        description = f"{name} of {self.identity.owner}, task {task} in federation {self.fed}"
        metadata = {"task": task, "federation": self.fed, "owner": self.identity.owner}
        async with raw_service.serve_raw(
            self._client, name, endpoints, version=version, description=description, metadata=metadata
        ):
            yield

    # --- hearing -----------------------------------------------------------------------------

    @asynccontextmanager
    async def advertise_service(self, *, task: str, version: str) -> AsyncIterator[None]:
        """For as long as the block runs `nats micro ls` shows the agent, also where it answers no request."""
        if not self._is_restricted:
            self._warn_on_clock_skew(await self.measure_clock_skew_s())
        if requests_answered_by(self.identity.agent):  # then `serve` does
            yield
            return
        async with self._open_service(task, version):
            yield

    def _open_service(self, task: str, version: str) -> AbstractAsyncContextManager[Service]:
        whose = f" of {self.identity.owner}" if self.identity.of_client else ""
        return micro_service(
            self._client,
            name=f"fedbus-{self.identity.agent}",
            version=version,
            description=f"{self.identity.agent}{whose}, task {task} in federation {self.fed}",
            metadata={"task": task, "federation": self.fed, "owner": self.identity.owner},
        )

    async def discover_agents(self, *, within_s: float = 1.0) -> list[ServiceInfo]:
        """Which agents of the federation say within that time that they are there. Not for a device to ask."""
        inbox, found = self._client.new_inbox(), []
        async with self.subscribe(inbox) as answers:
            await self._client.publish("$SRV.PING", reply=inbox)
            with contextlib.suppress(NatsError, TimeoutError):
                async with asyncio.timeout(within_s):
                    while said := (await answers.next_msg(timeout=within_s)).data:  # nothing: there is nobody
                        found.append(json.loads(said))
        of_each = [(one["name"], one.get("metadata") or {}) for one in found]
        return [
            ServiceInfo(name, its["owner"], its["task"])
            for name, its in of_each
            if its.get("federation") == self.fed
        ]

    async def create_streams(self) -> None:
        """Make what the federation needs. For the server side, which alone may."""
        await streams.create_streams(self._js, self.fed)

    async def create_client_consumer(self, agent: AgentName, *, task: str, client: str) -> str:
        """Make the durable consumer of a client's *agent*. For the server side, which alone may."""
        return await streams.create_consumer(
            self._js, self.fed, agent, task=task, owner=client, client=client
        )

    async def forget(self, agent: AgentName, *, task: str) -> None:
        """Drop the server side's consumer of *agent*, with all that waits in it."""
        await streams.delete_consumer(self._js, self.fed, agent, task=task, owner=SERVER_SIDE)

    @asynccontextmanager
    async def listen(self, agent: AgentName, *, task: str) -> AsyncIterator[AsyncIterator[Delivery]]:
        """What the durable consumer of *agent* holds and will hold, in order.

        What is not acknowledged comes again.

        A client's consumer is made for it when it enrolls; before that nothing comes.
        """
        owner = self.identity.owner
        if not self.identity.of_client:
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
                envelope, message = decode_message(raw.subject, raw.headers, raw.data)
            except DecodeError as error:
                await self._dead_letter(raw, agent, error)
            else:
                tracing.record_receive(message, envelope, raw)
                yield Delivery(message, envelope, raw, f"{self.source}/{agent}")

    @asynccontextmanager
    async def subscribe_ephemeral(
        self, kind: type[Message], *, task: str
    ) -> AsyncIterator[AsyncIterator[Message]]:
        """Messages of one *kind* as they come, kept or not: for what is only worth hearing at once."""
        async with self.subscribe(subjects.wildcard_for(self.fed, kind, task=task)) as subscription:
            yield _iter_messages(self._connection.messages(subscription))

    @asynccontextmanager
    async def subscribe(self, subject: str) -> AsyncIterator[Subscription]:
        """What is said on *subject*, unread; once the block begins nothing is missed. For the package's own."""
        subscription = await self._client.subscribe(subject, pending_bytes_limit=SUBSCRIPTION_PENDING_BYTES)
        await flush_subscriptions(self._client)
        try:
            yield subscription
        finally:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()

    async def _dead_letter(self, raw: Msg, agent: AgentName, reason: DecodeError) -> None:
        """A dead letter, and the consumer goes on: what is wrong with it will not get better."""
        log.warning("Message dead-lettered", subject=raw.subject, reason=str(reason))
        increment(DEAD_LETTERS)
        headers = {"fedbus-reason": " ".join(str(reason).split())[:500], "fedbus-subject": raw.subject}
        dead = subjects.dead_letter(self.fed, self.identity.owner, agent)
        await self.store(dead, headers, raw.data[:DEAD_LETTER_BYTES])
        await raw.term()

    # --- watching ------------------------------------------------------------------------------

    @asynccontextmanager
    async def watch(
        self,
        stream: str,
        wanted: list[str],
        *,
        since: datetime | None = None,
        after: int | None = None,
        whole: bool = False,
    ) -> AsyncIterator[AsyncIterator[StoredMessage]]:
        """What *stream* holds of the *wanted* subjects, and what comes; nothing is acknowledged.

        What it holds *since* then, *after* that sequence, or as a *whole*; without any, only what comes.
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
        """The last message on each of the *wanted* subjects that *stream* holds now.

        Raises:
            FederationNotFound: there is no such stream.
            NoResponse: JetStream does not answer.

        """
        return await _retry_read(stream, lambda: self._read_last_per_subject(stream, wanted))

    async def _read_last_per_subject(self, stream: str, wanted: list[str]) -> list[StoredMessage]:
        config = ConsumerConfig(deliver_policy=DeliverPolicy.LAST_PER_SUBJECT, filter_subjects=wanted)
        subscription = await self._subscribe_ordered(stream, wanted, config)
        found: list[StoredMessage] = []
        try:
            info = await subscription.consumer_info()
            # What has left the broker may not be here yet: the count is what both sides of the wire hold.
            handed_out = info.delivered.consumer_seq if info.delivered else 0
            for _ in range((info.num_pending or 0) + handed_out):
                raw = await next_message(subscription, ACK_TIMEOUT_S)
                with contextlib.suppress(DecodeError):
                    envelope, message = decode_message(raw.subject, raw.headers, raw.data)
                    found.append(StoredMessage(message, envelope, raw.subject, raw.metadata.sequence.stream))
        finally:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()
        return found

    async def latest(self, kind: type[Message]) -> list[StoredMessage]:
        """The last message of this *kind* of each device; none where the federation is older than what keeps them."""
        assert kind.keeps_last_value, kind.word
        with contextlib.suppress(FederationNotFound):
            return await self.last_per_subject(
                streams.devices_stream(self.fed), [subjects.wildcard_for(self.fed, kind)]
            )
        return []

    async def _subscribe_ordered(
        self, stream: str, wanted: list[str], config: ConsumerConfig
    ) -> JetStreamContext.PushSubscription:
        try:
            return await self._js.subscribe(wanted[0], stream=stream, config=config, ordered_consumer=True)
        except (NotFoundError, NoStreamResponseError, ServiceUnavailableError):
            raise FederationNotFound(self.fed) from None

    async def sequence_range(self, stream: str) -> tuple[int, int]:
        """The sequences of the first and the last message that *stream* holds.

        Raises:
            FederationNotFound: there is no such stream.
            NoResponse: JetStream does not answer.

        """
        try:
            state = (await _retry_read(stream, lambda: self._js.stream_info(stream))).state
        except (NotFoundError, NoStreamResponseError, ServiceUnavailableError):
            raise FederationNotFound(self.fed) from None
        return state.first_seq, state.last_seq

    async def measure_clock_skew_s(self, task: str = "") -> float | None:
        """By how many seconds this machine's clock is ahead of the broker's; None where nobody tells.

        A client with credentials may not ask the broker, and asks the server side of *task*. Right to half of
        what the question took.
        """
        asked = datetime.now(UTC)
        if self._is_restricted:
            request = GetLastTransition.model_validate(
                {"task": task, "client": self.identity.owner, "kind": "client"}
            )
            try:
                return _clock_skew_s(asked, (await self.request(request)).answered_at)
            except (NoResponse, RequestRefused):
                return None
        try:
            raw = await self._client.request(f"$JS.API.STREAM.INFO.{streams.events_stream(self.fed)}")
        except NatsError:
            return None
        if not (said := json.loads(raw.data).get("ts")):
            return None
        return _clock_skew_s(asked, datetime.fromisoformat(said).timestamp())

    def _warn_on_clock_skew(self, ahead_s: float | None) -> None:
        """One line, once: deadlines, credentials and traces are told by several clocks."""
        if ahead_s is not None and abs(ahead_s) > CLOCK_SKEW_WARNING_S and not self._has_warned_of_skew:
            self._has_warned_of_skew = True
            advice = "set the clock of this machine, or that of the server, whichever is wrong"
            log.warning("Clock skew against the NATS server", ahead_s=round(ahead_s, 1), advice=advice)

    async def list_streams(self) -> dict[str, int] | None:
        """The federation's streams that are there, with their messages; None where JetStream is off."""
        return await streams.list_streams(self._js, self.fed)

    async def states(self, kind: str, thing: str = ">") -> list[Transition]:
        """The last transition of every *kind* of thing, or of one: the state of the federation."""
        seen = await self.last_transitions(kind, thing)
        return [one.message for one in seen if isinstance(one.message, Transition)]

    async def last_transitions(self, kind: str, thing: str = ">") -> list[StoredMessage]:
        """The same, with what is known of each message: when it was said."""
        return await self.last_per_subject(
            streams.lifecycle_stream(self.fed), [subjects.lifecycle(self.fed, kind, thing)]
        )

    async def last_per_sender(self, kind: type[Message], *, task: str) -> list[Message]:
        """The last message of this *kind* that each of its senders has said."""
        wanted = subjects.wildcard_for(self.fed, kind, task=task)
        return [one.message for one in await self.last_per_subject(streams.events_stream(self.fed), [wanted])]

    async def last(self, subject: str) -> StoredMessage | None:
        """The last message of the lifecycle stream on *subject*; disconnections are retried without limit."""
        if self._is_restricted:
            return await self._request_last_transition(subject)
        raw = await self.last_raw_message(streams.lifecycle_stream(self.fed), subject)
        if raw is None:
            return None
        envelope, message = decode_message(subject, raw.headers, raw.data or b"")
        return StoredMessage(message, envelope, subject, int(raw.seq or 0))

    async def last_raw_message(self, stream: str, subject: str) -> RawStreamMsg | None:
        """The last message of any stream, unread: for the package's own."""

        async def read() -> RawStreamMsg | None:
            try:
                return await self._js.get_last_msg(stream, subject)
            except NotFoundError:
                return None

        errors = (*TRANSIENT_ERRORS, ServiceUnavailableError)
        return await _retry(read, errors, "Stream read failed; retrying", subject)

    async def _request_last_transition(self, subject: str) -> StoredMessage | None:
        """The same, as a client with credentials learns it: see `fedbus.contracts.state_recall`."""
        *_, kind, client, task = subject.split(".")
        request = GetLastTransition.model_validate({"task": task, "client": client, "kind": kind})

        async def ask() -> LastTransition:
            asked = datetime.now(UTC)
            answer: LastTransition = await self.request(request)
            self._warn_on_clock_skew(_clock_skew_s(asked, answer.answered_at))
            return answer

        last = await _retry(ask, (NoResponse, RequestRefused), "State read failed; retrying", subject)
        if not last.sequence:
            return None
        envelope, message = decode_message(subject, last.headers, last.body)
        return StoredMessage(message, envelope, subject, last.sequence)

    async def answer_last_transition(self, request: GetLastTransition) -> LastTransition:
        """The answer to a client that asks where it stands. For the server side."""
        life = streams.lifecycle_stream(self.fed)
        try:
            raw = await self._js.get_last_msg(
                life, subjects.lifecycle(self.fed, request.kind, f"{request.client}.{request.task}")
            )
        except NotFoundError:
            return LastTransition(answered_at=time.time())
        return LastTransition(
            sequence=int(raw.seq or 0),
            headers=dict(raw.headers or {}),
            body=raw.data or b"",
            answered_at=time.time(),
        )


@asynccontextmanager
async def _open_blobs(client: Client, identity: Identity) -> AsyncIterator[Blobs]:
    """Who carries no weights is not there for blobs: he may not even listen."""
    if identity.can_transfer_blobs:
        async with Blobs.open(client, identity.fed, identity.holder) as blobs:
            yield blobs
    else:
        yield Blobs(client, identity.fed, identity.holder)


async def _retry(
    attempt: Callable[[], Awaitable[T]], errors: tuple[type[Exception], ...], event: str, subject: str
) -> T:
    """Call *attempt* every `RETRY_S` until it succeeds; log *event* at each of *errors*."""

    def report(error: Exception, _: int) -> None:
        log.warning(event, subject=subject, reason=str(error) or type(error).__name__)

    return await retry(
        attempt, on=errors, backoff=RetryBackoff(first_s=RETRY_S, max_s=RETRY_S), on_failure=report
    )


def _clock_skew_s(asked: datetime, said_s: float) -> float | None:
    """How far our clock is ahead of one that said *said_s* in answer to what we *asked*; None where it said nothing."""
    now_s = datetime.now(UTC).timestamp()
    return (asked.timestamp() + now_s) / 2 - said_s if said_s else None


def _deliver_policy(since: datetime | None, after: int | None, *, whole: bool) -> DeliverPolicy:
    if since is not None:
        return DeliverPolicy.BY_START_TIME
    if after is not None:
        return DeliverPolicy.BY_START_SEQUENCE
    return DeliverPolicy.ALL if whole else DeliverPolicy.NEW


def _parse_reply(request: Request, reply: Msg) -> Any:
    if reply.headers and REFUSED_HEADER in reply.headers:
        refused = decode_body(Refused, reply.data)
        raise RequestRefused(request.word, refused.reason, kind=refused.kind)
    if reply.headers and "Nats-Service-Error" in reply.headers:
        raise RequestRefused(
            request.word, f"internal error in the {request.server}: {reply.headers['Nats-Service-Error']}"
        )
    return decode_body(request.answer, reply.data)


def _make_endpoint(handler: Handler, who: str) -> Callable[[MicroRequest], Awaitable[None]]:
    """*handler* of *who* as a micro endpoint. What is wrong with a request is the sender's to hear of."""

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
        with tracing.consumer_span(envelope, "answer", message, raw.subject, who):
            body = await handler(message)
        await raw.respond(
            pack(body), headers={REFUSED_HEADER: "refused"} if isinstance(body, Refused) else {}
        )

    return answer


async def _iter_messages(messages: AsyncIterator[Msg]) -> AsyncIterator[Message]:
    async for raw in messages:
        with contextlib.suppress(DecodeError):  # nobody waits for it and nothing is lost by it
            yield decode_message(raw.subject, raw.headers, raw.data)[1]


async def _retry_read(stream: str, read: Callable[[], Awaitable[T]]) -> T:
    """Try *read* again while JetStream does not answer; raises NoResponse when it has not in the end."""
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
