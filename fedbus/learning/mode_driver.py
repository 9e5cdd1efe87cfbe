"""Sends models and takes updates as an `AggregationPlanner` decides, for the modes in which rounds do not wait.

A library gives the driver the messages of a cohort, and the driver yields the updates of one aggregation:

    driver.begin_training()                            before the first round of a training
    for outcome in driver.train(round, cohort, …):     a round: valid updates and failures, in order of arrival
    for reply, sent in driver.exchange(messages, …):   other messages, such as those that evaluate

The client of an open message is busy: the driver sends it nothing else, which would only wait behind its training.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeAlias, TypeVar

import structlog

from fedbus.contracts.task.aggregation import AggregationMode, AggregationTable
from fedbus.learning.aggregation_planner import AggregationReport, Drop, Merge, make_planner
from fedbus.learning.library import ClientReply, ErrorCode, Messenger, OutgoingMessage, ReplyError
from fedbus.learning.stale_updates import UpdateRefused

MAX_WAIT_S: Final = 3600.0
"""The limit of one wait. Nothing happens at its end; a virtual clock may not represent infinity."""

S = TypeVar("S")
U = TypeVar("U")
log = structlog.get_logger("fedbus.learning")


@dataclass(frozen=True)
class TrackedMessage(Generic[S]):
    """A message, and what the library needs to read the reply, such as the arrays of the message."""

    message: OutgoingMessage
    sent: S


@dataclass(frozen=True)
class TakenUpdate(Generic[S, U]):
    """A valid update for this aggregation."""

    update: U
    sent: S
    merge: Merge
    reply: ClientReply


@dataclass(frozen=True)
class FailedTraining(Generic[S]):
    """A training without a valid update. The failure is recorded."""

    reply: ClientReply
    """Its error is the reason."""
    sent: S


Outcome: TypeAlias = TakenUpdate[S, U] | FailedTraining[S]


class ModeDriver(Generic[S]):
    """The driver of one run in the mode of *table*. *S* is what the library keeps of a message until its reply.

    Raises:
        ValueError: the mode is ``sync``, which needs no driver.

    """

    def __init__(self, messenger: Messenger, table: AggregationTable) -> None:
        planner = make_planner(table)
        if planner is None:
            raise ValueError("the mode is sync")
        self._messenger = messenger
        self._planner = planner
        self._wait_limit_s = table.deadline_s if table.mode is AggregationMode.DEADLINE else None
        """The limit for `exchange` once it has a reply."""
        self._trainings: dict[str, TrackedMessage[S]] = {}
        """The open messages that train, by id."""
        self._others: dict[str, str] = {}
        """The clients of other open messages, by id."""
        self._arrived: deque[ClientReply] = deque()
        """Replies to trainings that came during an `exchange`."""

    @property
    def report(self) -> AggregationReport:
        return self._planner.report

    def begin_training(self) -> None:
        """Begin a training of the app. Updates of a previous one count as dropped."""
        self._planner.restart()

    def train(
        self,
        round_number: int,
        cohort: Mapping[str, Callable[[], TrackedMessage[S]]],
        read: Callable[[ClientReply, S, Merge], U],
        *,
        timeout_s: float = math.inf,
    ) -> Iterator[Outcome[S, U]]:
        """Train in round *round_number* until it is time to aggregate.

        *cohort* has a function for each client that makes a new message with the newest model. *read* decodes the
        untrusted data of a reply and accepts it with the messenger, or raises UpdateRefused. After *timeout_s* the
        aggregation consists of the updates that have arrived.

        Raises:
            MessengerClosed: the run has ended.

        """
        messenger, planner = self._messenger, self._planner
        end = messenger.now() + timeout_s
        planner.begin(round_number, list(cohort), messenger.now())
        clients = frozenset(messenger.clients())
        while messenger.now() < end:
            if planner.is_complete(messenger.now(), self._without_busy(clients)):
                break
            self._post([cohort[client]() for client in planner.select()])
            reply = self._take_training(min(end, planner.deadline or math.inf), clients)
            if reply is None:
                clients = frozenset(messenger.clients())
            else:
                yield from self._handle(replace(reply, round=round_number), read)

    def exchange(
        self, requests: Sequence[TrackedMessage[S]], *, timeout_s: float = math.inf
    ) -> Iterator[tuple[ClientReply, S]]:
        """Send messages to the clients that are idle, and yield the replies in order of arrival.

        It ends without the others after *timeout_s*; and once there is a reply, after the limit of the driver. Updates
        that arrive meanwhile are for the next `train`.
        """
        messenger, start = self._messenger, self._messenger.now()
        idle = self._without_busy(frozenset(messenger.clients()))
        waiting = {
            request.message.message_id: request
            for request in requests
            if request.message.client in idle and not self._planner.is_training(request.message.client)
        }
        if busy := len(requests) - len(waiting):
            log.debug("Not sending messages to clients that are busy", clients=busy)
        messenger.post(request.message for request in waiting.values())
        self._others |= {key: request.message.client for key, request in waiting.items()}
        limit_s = timeout_s
        while waiting and messenger.now() - start < limit_s:
            reply = messenger.take(timeout_s=min(MAX_WAIT_S, max(0.0, start + limit_s - messenger.now())))
            if reply is None:
                continue
            key = reply.request.message_id
            if key in self._trainings:
                self._arrived.append(reply)
                continue
            self._others.pop(key, None)
            if (request := waiting.pop(key, None)) is not None:
                if self._wait_limit_s is not None:
                    limit_s = min(timeout_s, self._wait_limit_s)
                yield reply, request.sent

    def _without_busy(self, clients: frozenset[str]) -> frozenset[str]:
        """Return *clients* without those that still answer a message of `exchange`."""
        return clients.difference(self._others.values()) if self._others else clients

    def _post(self, requests: Sequence[TrackedMessage[S]]) -> None:
        if requests:
            self._trainings |= {request.message.message_id: request for request in requests}
            self._messenger.post(request.message for request in requests)

    def _take_training(self, until: float, clients: frozenset[str]) -> ClientReply | None:
        """Return the next reply to a training; None at *until*, if *clients* change, or for another reply."""
        if self._arrived:
            return self._arrived.popleft()
        left_s = min(MAX_WAIT_S, max(0.0, until - self._messenger.now()))
        reply = self._messenger.take(timeout_s=left_s, clients=clients)
        if reply is None or reply.request.message_id in self._trainings:
            return reply
        self._others.pop(reply.request.message_id, None)
        return None

    def _handle(
        self, reply: ClientReply, read: Callable[[ClientReply, S, Merge], U]
    ) -> Iterator[Outcome[S, U]]:
        request, client = self._trainings.pop(reply.request.message_id), reply.client
        verdict = self._planner.judge(client)
        if reply.error is not None:
            self._planner.record_failure(client)
            # the messenger has counted it for the round of the message; it counts for this one, too
            self._messenger.reject(reply, reply.error.reason)
            yield FailedTraining(reply, request.sent)
        elif isinstance(verdict, Drop):
            self._planner.record_update(client)
            log.info("Dropped a late update", client=client, round=reply.round, staleness=verdict.staleness)
        else:
            try:
                update = read(reply, request.sent, verdict)
            except UpdateRefused as error:
                self._planner.record_failure(client)
                self._messenger.reject(reply, str(error))
                failed = replace(reply, data=None, error=ReplyError(ErrorCode.UNKNOWN, f"{client}: {error}"))
                yield FailedTraining(failed, request.sent)
            else:
                self._planner.record_update(client)
                yield TakenUpdate(update, request.sent, verdict, reply)
