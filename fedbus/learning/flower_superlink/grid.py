"""Flower's Grid over the SuperLink of a run. fedbus adds lost clients, time limits, and the tallies of rounds."""

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from flwr.app import Error, Message, Metadata, RecordDict

from fedbus.contracts.round_messages import is_training
from fedbus.learning.compression import BadEncoding
from fedbus.learning.flower.client_app_host import client_metrics
from fedbus.learning.flower.node_polling import NodePoller, not_enough_clients
from fedbus.learning.flower.private_api import (
    NODE_UNAVAILABLE,
    SERVER_NODE_ID,
    UNKNOWN_ERROR,
    Run,
    build_message,
)
from fedbus.learning.flower.replies import GridClosed, round_number_of, sample_count
from fedbus.learning.flower.run_grid import RunGrid, without_missing_functions
from fedbus.learning.flower.sent_messages import SentMessages, SentRequest
from fedbus.learning.flower.update_check import check_update
from fedbus.learning.flower_superlink.fleet import SuperNodes
from fedbus.learning.flower_superlink.private_api import HttpGrid
from fedbus.learning.flower_superlink.superlink import SuperLink, SuperLinkEnded
from fedbus.learning.library import (
    ClientReply,
    Messenger,
    MessengerClosed,
    NotEnoughClients,
    OutgoingMessage,
    ReplyError,
    RoundTally,
)
from fedbus.learning.payload import Payload
from fedbus.learning.round_timing import ExchangeTiming
from fedbus.learning.stale_updates import UpdateRefused

PULL_PAUSE_S: Final = 3.0
"""The pause between two requests for replies, as in Flower's own Grid."""
CONNECT_PAUSE_S: Final = 0.5


class SuperLinkGrid(RunGrid):
    """The Grid of one run. A thread other than the app's may call `client_of` and `tally`."""

    def __init__(self, grid: HttpGrid, messenger: Messenger, link: SuperLink, nodes: SuperNodes) -> None:
        super().__init__()
        self._grid = grid
        self._messenger = messenger
        self._link = link
        self._nodes = nodes
        self._sent: dict[str, _SentMessage] = {}
        """The messages without a reply, by message id."""
        self._sent_messages = SentMessages()
        self._round = 0
        self._round_of_hook: int | None = None
        self._calls_made = 0
        """Count of send and pull calls: an app that makes some does not only wait for nodes."""
        self._poller = NodePoller(time.monotonic())

    @property
    def run_name(self) -> str:
        """The name of the run on the bus."""
        return self._messenger.run

    def now(self) -> float:
        return self._messenger.now()

    @property
    def run(self) -> Run:
        run: Run = self._grid.run
        return run

    def set_run(self, run: Run) -> None:
        """Do nothing: the run of the SuperLink is set already."""

    def get_node_ids(self) -> list[int]:
        """Return the ids of the connected SuperNodes.

        Raises:
            NotEnoughClients: the app has polled for longer than the plan's recruiting time.
            GridClosed: the run or the SuperLink has ended.

        """
        now = time.monotonic()
        node_ids = self._connected_nodes()
        limit_s = self._messenger.plan.recruit_s
        is_waiting = (
            self.is_waiting_for_nodes and self._poller.is_polling(now, self._calls_made) and not self._sent
        )
        if is_waiting and now - self._poller.since > limit_s:
            raise self._not_enough_clients(node_ids, limit_s)
        self._poller.record_answer(time.monotonic(), self._calls_made)
        return node_ids

    def wait_for_nodes(self, count: int) -> None:
        """Wait until each present client has a connected SuperNode, or has failed.

        Raises:
            NotEnoughClients: fewer than *count* are connected after the plan's recruiting time, or all others failed.
            GridClosed: the run or the SuperLink has ended.

        """
        limit_s = self._messenger.plan.recruit_s
        deadline = time.monotonic() + limit_s
        connected = self._connected_nodes()
        self._nodes.wait_until_registered(limit_s)
        while set(self._nodes.nodes.values()) - set(connected) and time.monotonic() < deadline:
            with self._nodes.changed:
                self._nodes.changed.wait(CONNECT_PAUSE_S)
            connected = self._connected_nodes()
        if len(connected) < count:
            clients = [self.client_of(node_id) for node_id in connected]
            raise not_enough_clients(
                clients, {**self._messenger.failed_clients(), **self._nodes.failed}, limit_s
            )

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._check_running()
        pushed = self._push(list(messages))
        for message_id, _ in pushed:
            if message_id:
                self._sent_messages.keep(self._sent[message_id].message)
        return [message_id for message_id, _ in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to *message_ids* that have arrived, and errors for SuperNodes that have ended."""
        self._check_running()
        self._calls_made += 1
        open_ids = [message_id for message_id in message_ids if message_id in self._sent]
        replies = list(self._grid.pull_messages(open_ids)) if open_ids else []
        answered = {reply.metadata.reply_to_message_id: reply for reply in replies}
        lost = self._nodes.failures_of(self._sent[message_id].node_id for message_id in open_ids)
        for message_id in open_ids:
            reason = lost.get(self._sent[message_id].node_id)
            # fedbus knows why a SuperNode has ended; the SuperLink only that it is silent
            if reason and (message_id not in answered or is_unavailable(answered[message_id])):
                answered[message_id] = self._make_lost_reply(self._sent[message_id], reason)
        return [self._receive(self._sent.pop(message_id), reply) for message_id, reply in answered.items()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send *messages* and return the replies that arrive within *timeout* and the plan's limit for a message."""
        if timeout is not None and timeout <= 0:
            self.push_messages(messages)
            return []
        limit_s = min(float("inf") if timeout is None else timeout, self._messenger.plan.round_s)
        deadline = time.monotonic() + limit_s
        self._check_running()
        open_ids = {message_id for message_id, _ in self._push(list(messages)) if message_id}
        replies: list[Message] = []
        while True:
            arrived = self.pull_messages(open_ids)
            replies += arrived
            open_ids -= {reply.metadata.reply_to_message_id for reply in arrived}
            left_s = deadline - time.monotonic()
            if not open_ids or left_s <= 0:
                break
            with self._nodes.changed:
                self._nodes.changed.wait(min(PULL_PAUSE_S, left_s))
        for message_id in open_ids:
            sent = self._sent.pop(message_id)
            self._messenger.reject(sent.reply(), f"no reply within {limit_s:g} s")
        return replies

    def set_round(self, number: int | None) -> None:
        """Set the round for which messages count from now on; None: the round that they name themselves."""
        self._round_of_hook = number

    def tally(self, round_number: int) -> RoundTally:
        """Return a copy of the participants of the round so far, with the SuperNodes that have ended since."""
        self._report_ended_nodes(round_number)
        return without_missing_functions(self._messenger.tally(round_number))

    def client_of(self, node: int) -> str:
        """Return the client of Flower's node id *node*."""
        return self._nodes.client_of(node)

    def _connected_nodes(self) -> list[int]:
        self._check_running()
        self._nodes.start_missing()
        registered = set(self._nodes.nodes.values())
        node_ids = [node_id for node_id in self._grid.get_node_ids() if node_id in registered]
        self._nodes.record_connected(node_ids)
        return node_ids

    def _not_enough_clients(self, connected: Iterable[int], waited_s: float) -> NotEnoughClients:
        failed = {**self._messenger.failed_clients(), **self._nodes.failed}
        return not_enough_clients([self.client_of(node_id) for node_id in connected], failed, waited_s)

    def _push(self, messages: list[Message]) -> list[tuple[str, Message]]:
        self._calls_made += 1
        named = next(filter(None, map(round_number_of, messages)), None)
        self._round = self._round_of_hook or named or self._round
        self.last_round = max(self.last_round, self._round)
        self._report_ended_nodes(self._round)
        contents = self._sent_messages.wrap(messages)
        ids = list(self._grid.push_messages(messages)) if messages else []
        for message_id, message, sent in zip(ids, messages, contents, strict=False):
            if message_id:
                client = self.client_of(message.metadata.dst_node_id)
                self._sent[message_id] = _SentMessage(client, self._round, sent)
        return list(zip(ids, messages, strict=False))

    def _report_ended_nodes(self, round_number: int) -> None:
        """Record SuperNodes that have ended without an open message as failures of the round."""
        for client, reason in self._nodes.take_unreported().items():
            self._messenger.reject(_make_reply(client, "train", round_number), reason)

    def _receive(self, sent: "_SentMessage", reply: Message) -> Message:
        """Decode and check the arrays of *reply*, record it for the tally of its round, and return it."""
        if not reply.has_error():
            try:
                self._sent_messages.decode(reply.content, sent.message)
                if self.checks_updates and is_training(sent.request.message_type):
                    check_update(reply.content, sent.message.content.arrays or {})
            except (BadEncoding, UpdateRefused) as error:
                reason = f"{sent.client}: invalid reply: {error}"
                reply = build_message(reply.metadata, error=Error(UNKNOWN_ERROR, reason))
        self._record(sent, reply)
        return reply

    def _record(self, sent: "_SentMessage", reply: Message) -> None:
        if reply.has_error():
            reason = reply.error.reason or ""
            self._messenger.reject(sent.reply(error=ReplyError(reply.error.code, reason)), reason)
        else:
            self._messenger.accept(sent.reply(content=reply.content), samples=sample_count(reply.content))

    def _make_lost_reply(self, sent: "_SentMessage", reason: str) -> Message:
        request = sent.request
        metadata = Metadata(
            run_id=request.run_id,
            message_id="",
            src_node_id=request.dst_node_id,
            dst_node_id=SERVER_NODE_ID,
            reply_to_message_id=request.message_id,
            group_id=request.group_id,
            created_at=time.time(),
            ttl=request.ttl,
            message_type=request.message_type,
        )
        return build_message(metadata, error=Error(NODE_UNAVAILABLE, f"{sent.client}: {reason}"))

    def _check_running(self) -> None:
        try:
            self._messenger.clients()
            self._link.check_running()
        except (MessengerClosed, SuperLinkEnded) as error:
            raise GridClosed(str(error)) from None


def is_unavailable(reply: Message) -> bool:
    """Return whether *reply* is the SuperLink's error for a SuperNode that is silent."""
    return bool(reply.has_error() and reply.error.code == NODE_UNAVAILABLE)


class _SentMessage:
    """A message of the app that waits for its reply."""

    def __init__(self, client: str, round_number: int, message: SentRequest) -> None:
        self.client = client
        self.round = round_number
        self.message = message
        self.request: Metadata = message.metadata
        self._sent_at = time.monotonic()

    @property
    def node_id(self) -> int:
        node_id: int = self.request.dst_node_id
        return node_id

    def reply(self, *, content: RecordDict | None = None, error: ReplyError | None = None) -> ClientReply:
        """Return the exchange as fedbus records it. The training time includes the way over the SuperLink."""
        kind = self.request.message_type
        now = time.monotonic()
        return replace(
            _make_reply(self.client, kind, self.round),
            error=error,
            metrics={} if content is None else client_metrics(kind, content),
            timing=None
            if content is None
            else ExchangeTiming(self.client, self._sent_at, now, now - self._sent_at),
        )


def _make_reply(client: str, kind: str, round_number: int) -> ClientReply:
    request = OutgoingMessage(client=client, kind=kind, payload=Payload.pack([]), round=round_number)
    return ClientReply(request=request, round=round_number)
