"""Gives the messages of a simulated run to the workers of its engine, as `Schedule` decides.

It also moves the state of clients between workers, asks for the rest of sums, and ends workers that handle one message
for longer than its limit.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fedbus.simulation.engine import (
    DiscardClient,
    EndSum,
    MessageBatch,
    MessageItem,
    SimulationEngine,
    StateTaken,
    TakeState,
    WorkerReply,
)
from fedbus.simulation.exchanges import Call, Exchange
from fedbus.simulation.scheduling import Job, Schedule

DEFAULT_TTL_S: Final = 3600.0


@dataclass(frozen=True)
class WorkerLoss:
    """What a worker had when it died."""

    jobs: list[Job]
    """Messages without a reply."""
    culprit: Job | None
    """The one because of which the worker died, if that is known: replies wait in the worker until they are sent."""
    stateful: list[int]
    """Clients that have lost their state."""
    expired_limit_s: float | None
    """The limit of the message because of which the worker was ended; None if the worker died by itself."""


class Dispatcher:
    """The side of a messenger towards the workers. Its methods are called with the lock of the messenger.

    *exchanges* are the open ones by number, which the messenger keeps. *in_order*: messages of a call are handled in
    their order. Without *has_time_limits*, a message may take as long as it needs.
    """

    def __init__(
        self,
        engine: SimulationEngine,
        exchanges: Mapping[int, Exchange],
        *,
        in_order: bool,
        has_time_limits: bool,
    ) -> None:
        self._engine = engine
        self._exchanges = exchanges
        self._has_time_limits = has_time_limits
        self._schedule = Schedule(engine.workers, in_order=in_order)
        self._summing: dict[int, Call] = {}
        """Calls with a sum of which workers have messages."""
        self._arrived_states: dict[int, bytes] = {}
        """The state of moving clients, by client, until their next message."""
        self._sent_states: dict[int, bytes] = {}
        """The state that went to a worker with a message, by its number, until the worker has replied to it."""
        self._busy_since: dict[int, float] = {}
        """The time of the last sign of each worker that has started, for the limit of messages."""
        self._expired: dict[int, Exchange] = {}
        """The message because of which a worker was ended, by worker."""

    # --- to the workers -----------------------------------------------------------------------

    def add(self, exchanges: Iterable[Exchange], *, is_first: bool = False) -> None:
        """Add messages, which `dispatch` gives to workers; with *is_first*, before those that wait."""
        self._schedule.add([exchange.job for exchange in exchanges], is_first=is_first)

    def cancel(self, call: Call) -> list[Job]:
        """Remove the messages of *call* that no worker has got, and return them."""
        return self._schedule.cancel(call.number)

    def dispatch(self) -> None:
        """Give each worker its next messages. No thread is in the engine."""
        taken = [self._schedule.take(worker) for worker in range(self._engine.workers)]
        for move in self._schedule.take_moves():
            order = TakeState(move.client) if move.has_state else DiscardClient(move.client)
            self._engine.submit(move.origin, order)
        now = time.monotonic()
        for worker, jobs in enumerate(taken):
            if jobs:
                self._submit(worker, jobs)
                is_idle = self._schedule.oldest_in_flight(worker) == jobs[0].number
                if is_idle and worker in self._busy_since:  # the limit does not include the start of a worker
                    self._busy_since[worker] = max(now, self._busy_since[worker])
        self._end_sums()

    def _submit(self, worker: int, jobs: list[Job]) -> None:
        batches: dict[tuple[object, ...], list[Exchange]] = {}
        for job in jobs:
            exchange = self._exchanges[job.number]
            message, call = exchange.message, exchange.call
            key = (call.number, exchange.placed.payload, message.kind, exchange.round)
            batches.setdefault((*key, message.group_id, message.ttl_s), []).append(exchange)
            if call.sum_request is not None:
                call.sum_workers.add(worker)
                self._summing[call.number] = call
        for exchanges in batches.values():
            first = exchanges[0]
            message = first.message
            items = [
                MessageItem(
                    one.job.number,
                    one.job.client,
                    one.message.message_id,
                    self._send_state(one.job) if self._arrived_states else None,
                )
                for one in exchanges
            ]
            batch = MessageBatch(
                items,
                first.placed.payload,
                message.kind,
                first.round or None,
                message.group_id,
                DEFAULT_TTL_S if message.ttl_s is None else message.ttl_s,
                message.created_at,
                first.call.sum_request,
            )
            self._engine.submit(worker, batch)

    def _send_state(self, job: Job) -> bytes | None:
        """Return the state that goes to a worker with *job*."""
        state = self._arrived_states.pop(job.client, None)
        if state is not None:
            self._sent_states[job.number] = state
        return state

    def _end_sums(self) -> None:
        """Ask for the rest of each sum whose messages all are with workers."""
        for call in list(self._summing.values()):
            if not self._schedule.has_waiting(call.number):
                for worker in call.sum_workers:
                    self._engine.submit(worker, EndSum(call.number))
                call.sum_workers.clear()
                del self._summing[call.number]

    def expire(self) -> float:
        """End workers that handle one message for longer than its limit. Return the seconds until the next check."""
        next_s = math.inf
        if not self._has_time_limits:
            return next_s
        now = time.monotonic()
        for worker, since in self._busy_since.items():
            number = self._schedule.oldest_in_flight(worker)
            exchange = None if number is None else self._exchanges.get(number)
            if exchange is None or worker in self._expired:
                continue
            left_s = since + exchange.limit_s - now
            if left_s <= 0:
                self._expired[worker] = exchange
                self._engine.kill(worker)
            else:
                next_s = min(next_s, left_s)
        return next_s

    # --- from the workers ---------------------------------------------------------------------

    def record_sign(self, worker: int) -> None:
        """Record that *worker* has started, or sent replies: the limit of its next message begins now."""
        self._busy_since[worker] = time.monotonic()

    def record_reply(self, worker: int, reply: WorkerReply) -> None:
        """Record that *worker* has handled a message, and has the state that went with it."""
        if self._sent_states:
            self._sent_states.pop(reply.number, None)
        self._schedule.finish(reply.number, worker, reply.seconds, has_state=reply.has_state)

    def record_state(self, event: StateTaken) -> None:
        """Take the state of a client on its way to another worker."""
        if event.state is not None:
            self._arrived_states[event.client] = event.state
        self._schedule.arrive(event.client, is_moved=event.is_movable, origin=event.worker)

    def lose(self, worker: int) -> WorkerLoss:
        """Record that *worker* has died, and return what it had."""
        jobs, stateful = self._schedule.lose(worker)
        self._busy_since.pop(worker, None)
        for job in jobs:
            state = self._sent_states.pop(job.number, None)
            if state is not None:  # it goes to the next worker
                self._arrived_states[job.client] = state
        expired = self._expired.pop(worker, None)
        culprit = jobs[0] if len(jobs) == 1 else None
        if expired is not None and culprit is not expired.job:  # its reply came when the worker was ended
            culprit = None
        return WorkerLoss(jobs, culprit, stateful, None if expired is None else expired.limit_s)
