"""Flower's `flwr.serverapp.Grid` over a `Messenger`: records to payloads, and replies to Flower's messages.

Records are encoded, hashed and decoded in the app's threads. After the end of the run, each call raises GridClosed.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import cast

import structlog
from flwr.app import Error, Message, Metadata, RecordDict

from fedbus.contracts.round_messages import is_training
from fedbus.learning.compression import BadEncoding
from fedbus.learning.flower import record_codec
from fedbus.learning.flower.node_ids import node_id, run_number
from fedbus.learning.flower.node_polling import MAX_BLOCK_S, NodePoller, not_enough_clients
from fedbus.learning.flower.partial_sums import FlowerPartialSum, SummableMessages, SummedReplies
from fedbus.learning.flower.private_api import (
    SERVER_NODE_ID,
    SYSTEM_MESSAGE_TYPE,
    UNKNOWN_ERROR,
    Run,
    build_message,
    empty_run,
    install_fast_records,
    set_message_id,
)
from fedbus.learning.flower.replies import (
    GridClosed,
    ModeMessages,
    ReplyStream,
    StreamedMessages,
    round_number_of,
    sample_count,
)
from fedbus.learning.flower.run_grid import RunGrid, without_missing_functions
from fedbus.learning.flower.sent_messages import SentMessages, SentRequest
from fedbus.learning.flower.update_check import check_update
from fedbus.learning.library import (
    ClientReply,
    ErrorCode,
    Messenger,
    MessengerClosed,
    ModeUnsupported,
    OutgoingMessage,
    ReplyError,
    RoundTally,
)
from fedbus.learning.mode_driver import TrackedMessage
from fedbus.learning.payload import Payload
from fedbus.learning.stale_updates import UpdateRefused

log = structlog.get_logger("fedbus.learning")
_node_id = lru_cache(maxsize=None)(node_id)


class MessengerGrid(RunGrid):
    """The Grid of one run."""

    def __init__(self, messenger: Messenger) -> None:
        super().__init__()
        install_fast_records()
        self._messenger = messenger
        self._run = empty_run(run_number(messenger.run))
        self._clients: dict[int, str] = {}
        """The clients that were present at some time, by Flower's node id."""
        self._requests: dict[str, SentRequest] = {}
        """The messages whose replies can be pulled, by message id."""
        self._sent = SentMessages()
        self._round: int | None = None
        """The round that messages count for; None is the round that they name themselves."""
        self._calls_made = 0
        """Count of send and pull calls; a thread that made one since its last poll does not wait for nodes."""
        self._pollers = threading.local()

    @property
    def messenger(self) -> Messenger:
        return self._messenger

    @property
    def run_name(self) -> str:
        """The name of the run on the bus."""
        return self._messenger.run

    def now(self) -> float:
        return self._messenger.now()

    @property
    def run(self) -> Run:
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run. Flower's interface requires it; the constructor sets the run already."""
        self._run = run

    def get_node_ids(self) -> list[int]:
        """Return the ids of the present nodes, in the order of their clients' names.

        A strategy that only polls this method is blocked until a node joins, at most `MAX_BLOCK_S` at a time.

        Raises:
            NotEnoughClients: a strategy has polled for longer than the plan's recruiting time.
            GridClosed: the run has ended.

        """
        with _as_grid_closed():
            clients = self._wait_for_clients() if self.is_waiting_for_nodes else self._messenger.clients()
        self._clients |= {_node_id(client): client for client in clients}
        return [_node_id(client) for client in sorted(clients)]

    def set_round(self, number: int | None) -> None:
        """Set the round of the run for which messages count from now on; None: the round that they name themselves."""
        self._round = number

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send *messages*, and return their ids. A message to a node that never was part of the run gets none."""
        with self._call():
            outgoing = self._encode(messages)
            self._requests |= {key: self._sent.keep(sent) for key, sent in _sent_by_id(outgoing).items()}
            return self._messenger.post(item for item, _ in outgoing)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to *message_ids* that have arrived, each once, and an error for each unknown id."""
        ids = list(dict.fromkeys(message_ids))
        known = [message_id for message_id in ids if message_id in self._requests]
        unknown = [message_id for message_id in ids if message_id not in self._requests]
        with self._call():
            replies = self._messenger.collect(known)
        pulled = [self.decode(reply, self._requests.pop(reply.request.message_id)) for reply in replies]
        return pulled + [self._make_unknown(message_id) for message_id in unknown]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send *messages*, wait for their replies, and return them in order of arrival.

        A reply that does not come within *timeout* seconds is absent, and can be pulled later. A message whose node
        fails, or whose time to live ends, gets an error reply. `StreamedMessages` get a `ReplyStream` instead.
        """
        if isinstance(messages, ModeMessages):
            with self._call():
                return messages.exchange(timeout)
        if timeout is not None and timeout <= 0:
            self.push_messages(messages)
            return []
        if isinstance(messages, SummableMessages) and self._messenger.adds_updates:
            sums: list[FlowerPartialSum] = []
            request = messages.weighted_by.encode()
            return cast("list[Message]", SummedReplies(self._send(messages, timeout, request, sums), sums))
        received = self._send(messages, timeout)
        is_streamed = isinstance(messages, StreamedMessages)
        if not is_streamed:
            return list(received)
        is_deterministic = self._messenger.plan.deterministic
        return cast("list[Message]", ReplyStream(received, is_deterministic=is_deterministic))

    def _send(
        self,
        messages: Iterable[Message],
        timeout: float | None,
        sum_request: bytes | None = None,
        sums: list[FlowerPartialSum] | None = None,
    ) -> Iterator[Message]:
        """Send *messages*, and return an iterator that waits for their replies, and adds the sums of them to *sums*."""
        with self._call():
            outgoing = self._encode(messages, sum_request=sum_request)
            requests = _sent_by_id(outgoing)
            replies = self._messenger.send((item for item, _ in outgoing), timeout_s=timeout)
        return self._receive(replies, requests, [] if sums is None else sums)

    def _receive(
        self, replies: Iterator[ClientReply], requests: dict[str, SentRequest], sums: list[FlowerPartialSum]
    ) -> Iterator[Message]:
        while True:
            with _as_grid_closed():
                reply = next(replies, None)
            if reply is None:
                return
            request = requests.pop(reply.request.message_id)
            if reply.sum is not None:
                partial = FlowerPartialSum.unpack(reply.sum)
                sums.append(partial)
                if partial.merged_count:
                    metadata = _reply_metadata(reply, request.metadata, self._run.run_id)
                    yield build_message(metadata, content=partial.merged_content())
            if reply.error is None and reply.data is None and reply.request.sum is not None:
                self._messenger.accept(reply, samples=reply.samples)  # it is one of the merged replies
            elif reply.error is not None and reply.error.code == ErrorCode.NO_REPLY:
                self._requests[reply.request.message_id] = self._sent.keep(request)
            else:
                yield self.decode(reply, request)

    def tally(self, round_number: int) -> RoundTally:
        """Return a copy of the participants of the round so far."""
        return without_missing_functions(self._messenger.tally(round_number))

    def client_of(self, node: int) -> str:
        """Return the client of Flower's node id *node*; a client that has left, too."""
        return self.find_client(node) or f"node {node}"

    def find_client(self, node: int) -> str | None:
        """Return the client of *node*, also of one that has left; None if there never was one."""
        if node not in self._clients:
            known = [*self._messenger.clients(), *self._messenger.failed_clients()]
            self._clients |= {_node_id(client): client for client in known}
        return self._clients.get(node)

    def encode(self, message: Message, payloads: dict[int, Payload]) -> TrackedMessage[SentRequest] | None:
        """Encode *message*, and add the payload of its content to *payloads* by id; None for an unknown node."""
        for item, sent in self._encode([message], payloads):
            return TrackedMessage(item, SentMessages.wrap([sent])[0])
        return None

    def _encode(
        self,
        messages: Iterable[Message],
        payloads: dict[int, Payload] | None = None,
        *,
        sum_request: bytes | None = None,
    ) -> list[tuple[OutgoingMessage, Message]]:
        """Encode and hash each content once, however many messages share it."""
        is_sent_by_app = payloads is None
        payloads = {} if payloads is None else payloads
        outgoing = []
        for message in messages:
            metadata = message.metadata
            if is_sent_by_app and self.training_refusal and is_training(metadata.message_type):
                raise ModeUnsupported(self.training_refusal)
            client = self.find_client(metadata.dst_node_id)
            if client is None:
                log.warning("Dropping a message to an unknown node", node=metadata.dst_node_id)
                continue
            key = id(message.content)
            if key not in payloads:
                encoded = record_codec.encode(message.content)
                payloads[key] = Payload.pack(encoded.buffers, as_blob=encoded.has_arrays)
            item = OutgoingMessage(
                client=client,
                kind=metadata.message_type,
                payload=payloads[key],
                round=round_number_of(message) if self._round is None else self._round,
                group_id=metadata.group_id,
                ttl_s=metadata.ttl,
                created_at=metadata.created_at,
                sum=sum_request,
            )
            self.last_round = max(self.last_round, item.round or 0)
            set_message_id(message, item.message_id)
            outgoing.append((item, message))
        return outgoing

    def _make_unknown(self, message_id: str) -> Message:
        """Return Flower's error reply to a message that does not exist, or whose reply has been pulled."""
        metadata = Metadata(
            run_id=self._run.run_id,
            message_id="",
            src_node_id=SERVER_NODE_ID,
            dst_node_id=SERVER_NODE_ID,
            reply_to_message_id=message_id,
            group_id="",
            created_at=time.time(),
            ttl=0,
            message_type=SYSTEM_MESSAGE_TYPE,
        )
        reason = f"there is no message {message_id!r}, or its reply has been pulled"
        return build_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))

    def decode(self, reply: ClientReply, request: SentRequest) -> Message:
        """Decode *reply* to a Flower message; an invalid reply becomes an error message of its client."""
        if reply.error is not None:
            return self.make_reply(reply, request)
        try:
            content = self.read(reply, request)
        except UpdateRefused as error:
            reason = f"{reply.client}: {error}"
            self._messenger.reject(reply, reason)
            failed = replace(reply, error=ReplyError(UNKNOWN_ERROR, reason))
            return self.make_reply(failed, request)
        self._messenger.accept(reply, samples=sample_count(content))
        return self.make_reply(reply, request, content)

    def read(self, reply: ClientReply, request: SentRequest) -> RecordDict:
        """Decode the untrusted content of *reply*, which is not an error.

        Raises:
            UpdateRefused: it cannot be decoded, or `checks_updates` is set and its arrays do not fit.

        """
        try:
            content = record_codec.decode(reply.data or b"")
            self._sent.decode(content, request)
        except (record_codec.RecordDecodeError, BadEncoding) as error:
            raise UpdateRefused(f"invalid reply: {error}") from None
        if self.checks_updates and is_training(reply.request.kind) and reply.request.sum is None:
            check_update(content, request.content.arrays or {})
        return content

    def make_reply(
        self, reply: ClientReply, request: SentRequest, content: RecordDict | None = None
    ) -> Message:
        """Return *reply* to *request* as Flower's message, with *content* or its error."""
        metadata = _reply_metadata(reply, request.metadata, self._run.run_id)
        if reply.error is not None:
            return build_message(metadata, error=Error(reply.error.code, reply.error.reason))
        return build_message(metadata, content=content)

    def _wait_for_clients(self) -> list[str]:
        """Return the present clients. Block the calling thread if it only polls for nodes."""
        now = time.monotonic()
        clients = self._messenger.clients()
        poller: NodePoller = self._pollers.__dict__.setdefault("state", NodePoller(now))
        if poller.is_polling(now, self._calls_made) and not self._messenger.has_open_messages:
            limit_s = self._messenger.plan.recruit_s
            left_s = poller.since + limit_s - now
            if left_s <= 0:
                raise not_enough_clients(clients, self._messenger.failed_clients(), limit_s)
            clients = self._messenger.wait_for_change(clients, timeout_s=min(left_s, MAX_BLOCK_S))
        poller.record_answer(time.monotonic(), self._calls_made)
        return clients

    @contextmanager
    def _call(self) -> Iterator[None]:
        try:
            with _as_grid_closed():
                yield
        finally:
            self._calls_made += 1


@contextmanager
def _as_grid_closed() -> Iterator[None]:
    try:
        yield
    except MessengerClosed as error:
        raise GridClosed(str(error)) from None


def _sent_by_id(outgoing: list[tuple[OutgoingMessage, Message]]) -> dict[str, SentRequest]:
    sent = SentMessages.wrap([message for _, message in outgoing])
    return {item.message_id: message for (item, _), message in zip(outgoing, sent, strict=True)}


def _reply_metadata(reply: ClientReply, request: Metadata, run_id: int) -> Metadata:
    return Metadata(
        run_id=run_id,
        message_id=reply.message_id,
        src_node_id=request.dst_node_id,
        dst_node_id=SERVER_NODE_ID,
        reply_to_message_id=request.message_id,
        group_id=request.group_id,
        created_at=reply.created_at,
        ttl=reply.ttl_s if reply.message_id else request.ttl,
        message_type=request.message_type,
    )
