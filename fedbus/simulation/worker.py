"""A worker of a simulation: holds the sessions of its clients, and answers their messages one after the other.

It does not know its engine: an engine hands it orders and takes its events.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import structlog

from fedbus.contracts.run import Scalar
from fedbus.learning.data.client_data import PARTITION_ID
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import (
    BadTask,
    ClientJob,
    ClientResponse,
    ClientSession,
    ErrorCode,
    IncomingMessage,
    ReplyError,
    StateNotMovable,
    SummingLibrary,
    SummingSession,
    UpdateSum,
)
from fedbus.learning.seeding import seed_client
from fedbus.learning.task_code import format_error
from fedbus.simulation.client_state import ClientSessions, is_memory_short
from fedbus.simulation.engine import (
    DiscardClient,
    EndSum,
    Event,
    MessageBatch,
    MessageItem,
    Order,
    ReleasePayload,
    Replies,
    StateTaken,
    SumRequest,
    SumTaken,
    TakeState,
    WorkerJob,
    WorkerReply,
)

FLUSH_S: Final = 0.02
"""The time for which replies are collected before they are sent together."""
FLUSH_BYTES: Final = 64 * 1024
"""The size of the payloads of collected replies, above which they are sent at once."""
SUM_S: Final = 1.0
"""The time for which updates are added to one sum before it is sent."""
SUM_COST_RATIO: Final = 50
"""A sum is sent at most once in this multiple of the time that sending the last one took."""

log = structlog.get_logger("fedbus.simulation")


class SimulationWorker:
    """Worker number *number* of a simulation."""

    def __init__(self, number: int, job: WorkerJob) -> None:
        self._number = number
        self._job = job
        self._library = open_library(job.task.table.library)
        directory = None if job.state_dir is None else Path(job.state_dir) / f"worker-{number}"
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self._sessions = ClientSessions(
            self._open_session,
            directory=directory,
            is_memory_short=partial(is_memory_short, job.memory_share),
        )
        self._node_configs: dict[int, dict[str, Scalar]] = {}
        self._sums: dict[int, _RunningSum] = {}
        """By the number of the `SumRequest`."""
        self._caches: dict[int, dict[str, Any]] = {}
        """What the library has made of a payload, by its id."""

    def handle(self, order: Order, data: bytes | memoryview = b"") -> Iterator[Event]:
        """Carry out *order*. The payload of a batch is *data*. Yields events as soon as they are worth sending."""
        match order:
            case MessageBatch(sum=SumRequest() as request):
                yield from self._add_batch(order, data, request)
            case MessageBatch():
                yield from self._answer_batch(order, data)
            case EndSum(number=number):
                yield from self._end_sum(number)
            case TakeState(client=client):
                # updates leave before the state after them: else the client repeats them if this worker dies
                for number, running in self._sums.items():
                    yield from self._take_sum(number, running)
                yield self._take_state(client)
            case DiscardClient(client=client):
                self._sessions.discard(client)
                self._node_configs.pop(client, None)
            case ReleasePayload(payload=payload):
                self._caches.pop(payload, None)

    def close(self) -> None:
        """Close all sessions."""
        self._sessions.close()

    # --- messages -----------------------------------------------------------------------------

    def _answer_batch(self, batch: MessageBatch, data: bytes | memoryview) -> Iterator[Replies]:
        replies: list[WorkerReply] = []
        buffers: list[memoryview] = []
        size, start = 0, time.monotonic()
        for item in batch.items:
            reply, payload = self._answer(item, batch, data, None)
            replies.append(reply)
            buffers += payload
            size += reply.size or 0
            if size > FLUSH_BYTES or time.monotonic() - start > FLUSH_S:
                yield Replies(self._number, replies, buffers)
                replies, buffers, size, start = [], [], 0, time.monotonic()
            self._sessions.relieve_memory()
        if replies:
            yield Replies(self._number, replies, buffers)

    def _answer(
        self,
        item: MessageItem,
        batch: MessageBatch,
        data: bytes | memoryview,
        update_sum: UpdateSum | None,
    ) -> tuple[WorkerReply, list[memoryview]]:
        """Answer one message. Return the reply and the buffers of its payload."""
        start = time.monotonic()
        response = self._call_session(item, batch, data, update_sum)
        seconds = time.monotonic() - start
        payload = response.payload if response.error is None else None
        reply = WorkerReply(
            item.number,
            seconds,
            seconds if response.train_s is None else response.train_s,
            response.created_at,
            batch.ttl_s if response.ttl_s is None else response.ttl_s,
            None if payload is None else payload.size_bytes,
            response.error,
            response.metrics,
            self._sessions.has_state(item.client),
            response.samples,
        )
        return reply, [] if payload is None else payload.buffers

    def _call_session(
        self,
        item: MessageItem,
        batch: MessageBatch,
        data: bytes | memoryview,
        update_sum: UpdateSum | None,
    ) -> ClientResponse:
        client = item.client
        try:
            session = self._sessions.get(client, item.state)
            message = IncomingMessage(
                message_id=item.message_id,
                kind=batch.kind,
                data=data,
                round=batch.round,
                group_id=batch.group_id,
                ttl_s=batch.ttl_s,
                created_at=batch.created_at,
                node_config=self._node_configs[client],
                cache=self._caches.setdefault(batch.payload, {}),
            )
            if self._job.seed is not None:
                name = self._job.client_name(client)
                seed_client(self._job.seed, client=name, round_number=batch.round, kind=batch.kind)
            if update_sum is not None:
                return cast("SummingSession", session).handle_in_sum(message, update_sum)
            return session.handle(message)
        except BadTask as error:
            return ClientResponse(error=ReplyError(ErrorCode.LOAD_FAILED, str(error), "BadTask"))
        except Exception as error:
            log.warning("Training library failed", client=self._job.client_name(client), exc_info=error)
            self._sessions.discard(client)
            reason = f"the training library failed: {format_error(error)}"
            return ClientResponse(error=ReplyError(ErrorCode.UNKNOWN, reason, type(error).__name__))

    def _open_session(self, client: int) -> ClientSession:
        """Open the session of *client*. Raises BadTask."""
        job = self._job
        node_config = self._node_configs.get(client)
        if node_config is None:
            node_config = self._node_configs[client] = {PARTITION_ID: client, **job.node_config}
        return self._library.open_client(
            ClientJob(
                task=job.task,
                client=job.client_name(client),
                run=job.run,
                plan=job.plan,
                node_config=node_config,
            )
        )

    # --- sums ---------------------------------------------------------------------------------

    def _add_batch(
        self, batch: MessageBatch, data: bytes | memoryview, request: SumRequest
    ) -> Iterator[Event]:
        """Answer the messages of *batch*, and add their updates to the sum of *request*."""
        running = self._sums.get(request.number)
        if running is None:
            assert isinstance(self._library, SummingLibrary)
            running = self._sums[request.number] = _RunningSum(self._library.open_sum(request.request))
        replies: list[WorkerReply] = []
        buffers: list[memoryview] = []
        start = time.monotonic()
        for item in batch.items:
            reply, payload = self._answer(item, batch, data, running.update_sum)
            replies.append(reply)
            buffers += payload
            now = time.monotonic()
            is_due = running.is_due(now)
            if is_due or now - start > FLUSH_S:
                yield Replies(self._number, replies, buffers)
                replies, buffers, start = [], [], now
            if is_due:
                yield from self._take_sum(request.number, running)
            self._sessions.relieve_memory()
        if replies:
            yield Replies(self._number, replies, buffers)

    def _end_sum(self, number: int) -> Iterator[SumTaken]:
        running = self._sums.pop(number, None)
        if running is not None:
            yield from self._take_sum(number, running)

    def _take_sum(self, number: int, running: "_RunningSum") -> Iterator[SumTaken]:
        start = time.monotonic()
        payload = running.update_sum.take()
        yield SumTaken(
            self._number,
            number,
            None if payload is None else payload.size_bytes,
            () if payload is None else payload.buffers,
        )
        running.record_taken(time.monotonic(), time.monotonic() - start)

    # --- state --------------------------------------------------------------------------------

    def _take_state(self, client: int) -> StateTaken:
        try:
            state = self._sessions.remove(client)
        except StateNotMovable as error:
            log.info("State of a client cannot move", client=client, reason=str(error))
            return StateTaken(self._number, client, is_movable=False)
        self._node_configs.pop(client, None)
        return StateTaken(self._number, client, state=state)


class _RunningSum:
    """A sum, and when it is sent."""

    def __init__(self, update_sum: UpdateSum) -> None:
        self.update_sum = update_sum
        self._interval_s = SUM_S
        self._taken_at = time.monotonic()

    def is_due(self, now: float) -> bool:
        return now - self._taken_at > self._interval_s

    def record_taken(self, now: float, seconds: float) -> None:
        """Record that sending the sum took *seconds*. A large sum is sent less often."""
        self._taken_at = now
        self._interval_s = max(SUM_S, SUM_COST_RATIO * seconds)
