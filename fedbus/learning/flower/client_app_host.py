"""Runs a task's ClientApp unmodified: takes a message of the server and returns the reply.

The host exists for one run, and keeps ``context.state`` from message to message. An app that raises gives an error
reply with Flower's error code; the host continues.
"""

import time
from collections.abc import Mapping
from copy import deepcopy
from typing import Final

import structlog
from flwr.app import Context, Message, Metadata, RecordDict

from fedbus.learning.compression import make_encoding
from fedbus.learning.flower import record_codec, task_code
from fedbus.learning.flower.array_records import metric_records_of
from fedbus.learning.flower.compressed_records import server_decodes_updates
from fedbus.learning.flower.mods import compression_mod
from fedbus.learning.flower.node_ids import node_id, run_number
from fedbus.learning.flower.private_api import (
    CLIENT_APP_RAISED,
    SERVER_NODE_ID,
    UNKNOWN_ERROR,
    build_message,
    install_fast_records,
)
from fedbus.learning.flower.update_sum import FlowerUpdateSum
from fedbus.learning.library import (
    MAX_REASON_CHARS,
    ClientJob,
    ClientResponse,
    ErrorCode,
    IncomingMessage,
    ReplyError,
    UpdateSum,
)
from fedbus.learning.payload import Payload
from fedbus.learning.round_metrics import normalize_metrics
from fedbus.learning.stale_updates import UpdateRefused

RUN_CONFIG_CHANGED: Final = "the ClientApp changed `context.run_config`, which Flower does not allow"

NUM_EXAMPLES_KEY: Final = "num-examples"
METRIC_PREFIXES: Final = {"train": "train_", "evaluate": "eval_"}
"""Prefixes of metric names, by the first part of Flower's message type."""

log = structlog.get_logger("fedbus.learning")


class ClientAppHost:
    """The ClientApp of one client in one run. Raises BadTask if it cannot be loaded."""

    def __init__(self, job: ClientJob) -> None:
        install_fast_records()
        self._job = job
        self._app = task_code.load_client_app(job.path, job.task.app["clientapp"])
        encoding = make_encoding(job.task.table.compression)
        self._compress = None if encoding is None else compression_mod(encoding)
        self._context = Context(
            run_id=run_number(job.run),
            node_id=node_id(job.client),
            node_config=dict(job.node_config),
            state=RecordDict(),
            run_config=job.config,
        )
        self._config = job.config
        """To detect a change of the configuration by the app."""

    def handle(self, message: IncomingMessage) -> ClientResponse:
        """Run the app on a message. This blocks as long as the training; errors of the app become error replies.

        The message's *node_config* replaces the previous one, since the data of the device changes between messages.
        """
        return self._handle(message, None)

    def handle_in_sum(self, message: IncomingMessage, update_sum: UpdateSum) -> ClientResponse:
        """Do the same, and add the update to *update_sum*."""
        assert isinstance(update_sum, FlowerUpdateSum)
        return self._handle(message, update_sum)

    def _handle(self, message: IncomingMessage, update_sum: FlowerUpdateSum | None) -> ClientResponse:
        try:
            content = _decode(message)
        except record_codec.RecordDecodeError as error:
            return _make_error(ErrorCode.MESSAGE_UNAVAILABLE, f"cannot decode the message: {error}")
        self._context.node_config = dict(message.node_config)
        state = deepcopy(self._context.state) if self._context.state else RecordDict()
        start = time.monotonic()
        try:
            with server_decodes_updates():
                reply = self._call(self._make_message(message, content))
            response = _make_response(message, reply, start, update_sum)
            if self._context.run_config == self._config:
                return response
            self._restore(state)
            return _make_error(UNKNOWN_ERROR, RUN_CONFIG_CHANGED, start=start)
        except (Exception, SystemExit) as error:
            self._restore(state)
            log.warning("ClientApp raised", run=self._job.run, round=message.round, exc_info=error)
            reason = f"the ClientApp raised {task_code.describe_error(error, self._job.path)}"
            return _make_error(CLIENT_APP_RAISED, reason, start=start, kind=type(error).__name__)

    def _call(self, message: Message) -> Message:
        if self._compress is None:
            return self._app(message, self._context)
        return self._compress(message, self._context, self._app)

    def _restore(self, state: RecordDict) -> None:
        """Set the context to that before the message: as in Flower, a message that fails leaves no trace in it."""
        self._context.state = state
        self._context.run_config = self._job.config

    @property
    def has_state(self) -> bool:
        """Whether the app has put something into ``context.state``."""
        return bool(self._context.state)

    def dump_state(self) -> bytes | None:
        """Return ``context.state``, encoded; None if it is empty."""
        return record_codec.encode(self._context.state).to_bytes() if self._context.state else None

    def load_state(self, state: bytes) -> None:
        """Set ``context.state``."""
        self._context.state = record_codec.decode(state)

    def close(self) -> None:
        """Do nothing: the state ends with the process."""

    def _make_message(self, message: IncomingMessage, content: RecordDict) -> Message:
        metadata = Metadata(
            run_id=self._context.run_id,
            message_id=message.message_id,
            src_node_id=SERVER_NODE_ID,
            dst_node_id=self._context.node_id,
            reply_to_message_id="",
            group_id=message.group_id,
            created_at=message.created_at,
            ttl=message.ttl_s,
            message_type=message.kind,
        )
        return build_message(metadata, content=content)


def client_metrics(kind: str, content: RecordDict) -> Mapping[str, float]:
    """Return the metrics of a reply by their common names, such as ``train_loss`` and ``eval_accuracy``.

    If two records share a name, that of the later record is ``train_<record>.loss``.
    """
    prefix = METRIC_PREFIXES.get(kind.partition(".")[0])
    metrics: dict[str, float] = {}
    for record_name, record in metric_records_of(content).items() if prefix is not None else ():
        for name, value in normalize_metrics(record, prefix=prefix or "").items():
            key = name if name not in metrics else f"{prefix}{record_name}.{name.removeprefix(prefix or '')}"
            metrics[key] = value
    return metrics


def _decode(message: IncomingMessage) -> RecordDict:
    """Decode the content of *message*, once for all clients with a common cache. Raises RecordDecodeError."""
    if message.cache is None:
        return record_codec.decode(message.data)
    decoded = message.cache.get("content")
    if decoded is None:
        decoded = message.cache["content"] = record_codec.decode(message.data)
    return record_codec.copy_records(decoded)


def _make_response(
    message: IncomingMessage, reply: object, start: float, update_sum: FlowerUpdateSum | None
) -> ClientResponse:
    train_s = time.monotonic() - start
    if not isinstance(reply, Message):
        raise TypeError(f"it returned {type(reply).__name__} instead of a flwr.app.Message")
    if reply.has_error():
        return _make_error(reply.error.code, reply.error.reason or "", start=start, of_app=True)
    outline: RecordDict | None = reply.content
    if update_sum is not None:
        try:
            outline = update_sum.add(message, reply.content)
        except UpdateRefused as error:
            return _make_error(UNKNOWN_ERROR, str(error), start=start, kind="UpdateRefused")
    return ClientResponse(
        payload=None if outline is None else _pack(outline),
        metrics=client_metrics(message.kind, reply.content),
        train_s=train_s,
        samples=_count_samples(reply.content),
        created_at=reply.metadata.created_at,
        ttl_s=reply.metadata.ttl,
    )


def _pack(content: RecordDict) -> Payload:
    encoded = record_codec.encode(content)
    return Payload.pack(encoded.buffers, as_blob=encoded.has_arrays)


def _count_samples(content: RecordDict) -> int:
    """Return the first ``num-examples`` of the reply, the key by which Flower's strategies weigh it; 0 without one."""
    counts = (record.get(NUM_EXAMPLES_KEY) for record in metric_records_of(content).values())
    return next((int(count) for count in counts if isinstance(count, int | float) and count >= 0), 0)


def _make_error(
    code: int, reason: str, *, start: float | None = None, kind: str = "", of_app: bool = False
) -> ClientResponse:
    """Make an error reply. The text of an error *of_app* stays as it is, up to the limit."""
    text = reason if of_app else " ".join(reason.split())
    error = ReplyError(code, text[:MAX_REASON_CHARS], kind or str(code))
    return ClientResponse(error=error, train_s=0.0 if start is None else time.monotonic() - start)
