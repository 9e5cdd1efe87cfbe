"""A worker of a simulation: holds the sessions of its clients, and answers their messages one after the other.

It does not know its engine: an engine hands it orders and takes its events.
"""

import time
from collections.abc import Callable, Iterator
from typing import Final

from fedbus.contracts.run import Scalar
from fedbus.learning.library import (
    ClientJob,
    ClientResponse,
    ClientSession,
    ErrorCode,
    IncomingMessage,
    ReplyError,
    open_library,
)
from fedbus.learning.task_code import BadTask, format_error
from fedbus.simulation.engine import MessageBatch, MessageItem, Replies, WorkerJob, WorkerReply

FLUSH_S: Final = 0.02
"""The time for which replies are collected before they are sent together."""
FLUSH_BYTES: Final = 64 * 1024
"""The size of the payloads of collected replies, above which they are sent at once."""


class SimulationWorker:
    """Worker number *number* of a simulation."""

    def __init__(self, number: int, job: WorkerJob) -> None:
        self._number = number
        self._job = job
        self._library = open_library(job.task.table.library)
        self._sessions: dict[int, ClientSession] = {}
        self._node_configs: dict[int, dict[str, Scalar]] = {}

    def handle(self, batch: MessageBatch, data: bytes | memoryview) -> Iterator[Replies]:
        """Answer the messages of *batch*, whose payload is *data*. Yields replies as soon as there are enough."""
        replies: list[WorkerReply] = []
        buffers: list[memoryview] = []
        size, start = 0, time.monotonic()
        for item in batch.items:
            reply = self._answer(item, batch, data, buffers)
            replies.append(reply)
            size += reply.size or 0
            if size > FLUSH_BYTES or time.monotonic() - start > FLUSH_S:
                yield Replies(self._number, replies, buffers)
                replies, buffers, size, start = [], [], 0, time.monotonic()
        if replies:
            yield Replies(self._number, replies, buffers)

    def close(self) -> None:
        """Close all sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def _answer(
        self, item: MessageItem, batch: MessageBatch, data: bytes | memoryview, buffers: list[memoryview]
    ) -> WorkerReply:
        """Answer one message, and add the payload of the reply to *buffers*."""
        start = time.monotonic()
        try:
            session = self._session(item.client)
        except BadTask as error:
            response = ClientResponse(error=ReplyError(ErrorCode.LOAD_FAILED, str(error), "BadTask"))
        else:
            response = session.handle(
                IncomingMessage(
                    message_id=item.message_id,
                    kind=batch.kind,
                    data=data,
                    round=batch.round,
                    group_id=batch.group_id,
                    ttl_s=batch.ttl_s,
                    created_at=batch.created_at,
                    node_config=self._node_configs[item.client],
                )
            )
        seconds = time.monotonic() - start
        payload = response.payload if response.error is None else None
        if payload is not None:
            buffers += payload.buffers
        return WorkerReply(
            item.number,
            seconds,
            seconds if response.train_s is None else response.train_s,
            response.created_at,
            batch.ttl_s if response.ttl_s is None else response.ttl_s,
            None if payload is None else payload.size_bytes,
            response.error,
            response.metrics,
        )

    def _session(self, client: int) -> ClientSession:
        """Return the session of *client*, opened at its first message. Raises BadTask."""
        session = self._sessions.get(client)
        if session is None:
            job = self._job
            node_config: dict[str, Scalar] = {"partition-id": client, **job.node_config}
            session = self._library.open_client(
                ClientJob(
                    task=job.task,
                    client=job.client_name(client),
                    run=job.run,
                    plan=job.plan,
                    node_config=node_config,
                )
            )
            self._sessions[client] = session
            self._node_configs[client] = node_config
        return session


Read = Callable[[int], bytes | memoryview]
"""Returns the bytes of a payload by its id."""


def describe_fault(error: BaseException) -> str:
    """Describe an exception of a library in a worker, which ends the worker."""
    return f"the training library failed: {format_error(error)}"
