"""Runs a task's ClientApp unmodified: takes a message of the server and returns the reply.

The host exists for one run, in a worker thread or process, and keeps ``context.state`` from message to message.
An app that raises or cannot be loaded gives an error reply with Flower's error code; the host continues.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import structlog
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from fedbus.contracts.client import RoundReply
from fedbus.contracts.run import Scalar
from fedbus.contracts.server import MessageContent, RoundMessage
from fedbus.learning.flower import task_code
from fedbus.learning.flower.node_ids import node_id, run_number
from fedbus.learning.flower.private_api import (
    CLIENT_APP_RAISED,
    LOAD_CLIENT_APP_FAILED,
    MESSAGE_UNAVAILABLE,
    SERVER_NODE_ID,
    build_message,
)
from fedbus.learning.round_metrics import normalize_metrics

MAX_REASON_CHARS: Final = 1000

METRIC_PREFIXES: Final = {"train": "train_", "evaluate": "eval_"}
"""Prefixes of metric names, by the first part of Flower's message type."""

log = structlog.get_logger("fedbus.learning")


@dataclass(frozen=True)
class ClientAppReply:
    """The result of a message: the content of the reply, or an error."""

    request: RoundMessage
    created_at: float
    ttl_s: float
    train_s: float
    content: RecordDict | None = None
    error_code: int | None = None
    error_reason: str = ""
    error_kind: str = ""
    """The name of the exception type, or else Flower's code: a low-cardinality attribute."""
    left_out: int = 0
    """Count of captured rows that did not validate and that the app did not get."""

    def to_message(self, content: MessageContent | None) -> RoundReply:
        """Build the event of this reply. *content* is the encoded `self.content`, or None for an error."""
        return RoundReply(
            task=self.request.task,
            client=self.request.client,
            run=self.request.run,
            round=self.request.round,
            message_id=uuid4().hex,
            reply_to=self.request.message_id,
            created_at=self.created_at,
            ttl_s=self.ttl_s,
            content=content,
            error_code=self.error_code,
            error_reason=self.error_reason,
            train_s=self.train_s,
            left_out=self.left_out,
            figures=self.figures,
        )

    @property
    def figures(self) -> dict[str, float]:
        """The metrics of the reply by their common names, such as ``train_loss`` and ``eval_accuracy``."""
        prefix = METRIC_PREFIXES.get(self.request.message_type.partition(".")[0])
        if self.content is None or prefix is None:
            return {}
        return {
            name: value
            for metrics in self.content.metric_records.values()
            for name, value in normalize_metrics(metrics, prefix=prefix).items()
        }


class ClientAppHost:
    """The ClientApp of one client in one run."""

    def __init__(
        self,
        task_path: Path,
        clientapp: str,
        *,
        client: str,
        run: str,
        run_config: dict[str, Scalar],
        node_config: dict[str, Scalar] | None = None,
    ) -> None:
        self._task_path = task_path
        self._reference = clientapp
        self._app: ClientApp | None = None
        self._context = Context(
            run_id=run_number(run),
            node_id=node_id(client),
            node_config=dict(node_config or {}),
            state=RecordDict(),
            run_config=dict(run_config),
        )

    def handle(
        self,
        message: RoundMessage,
        content: RecordDict,
        *,
        node_config: dict[str, Scalar] | None = None,
    ) -> ClientAppReply:
        """Run the app on a message. This blocks as long as the training; errors of the app become error replies.

        *node_config* replaces the previous one, since the data of the device changes between messages.
        """
        if node_config is not None:
            self._context.node_config = dict(node_config)
        start = time.monotonic()
        try:
            app = self._load_app()
        except task_code.BadTask as error:
            return _make_error_reply(message, LOAD_CLIENT_APP_FAILED, str(error), start, type(error).__name__)
        try:
            reply = app(self._make_message(message, content), self._context)
            return _make_reply(message, reply, start)
        except (Exception, SystemExit) as error:
            log.warning("ClientApp raised", run=message.run, round=message.round, exc_info=error)
            reason = f"the ClientApp raised {task_code.format_error(error)}"
            return _make_error_reply(message, CLIENT_APP_RAISED, reason, start, type(error).__name__)

    def load(self) -> None:
        """Import the app before the first message. Raises BadTask."""
        self._load_app()

    def _load_app(self) -> ClientApp:
        if self._app is None:
            self._app = task_code.load_client_app(self._task_path, self._reference)
        return self._app

    def _make_message(self, message: RoundMessage, content: RecordDict) -> Message:
        metadata = Metadata(
            run_id=self._context.run_id,
            message_id=message.message_id,
            src_node_id=SERVER_NODE_ID,
            dst_node_id=self._context.node_id,
            reply_to_message_id="",
            group_id=message.group_id,
            created_at=message.created_at,
            ttl=message.ttl_s,
            message_type=message.message_type,
        )
        return build_message(metadata, content=content)


def make_undelivered_reply(message: RoundMessage, reason: str) -> ClientAppReply:
    """Return the error reply to a message whose content could not be fetched."""
    return _make_error_reply(
        message, MESSAGE_UNAVAILABLE, f"cannot fetch the message: {reason}", time.monotonic()
    )


def _make_reply(message: RoundMessage, reply: object, start: float) -> ClientAppReply:
    if not isinstance(reply, Message):
        raise TypeError(f"it returned {type(reply).__name__} instead of a flwr.app.Message")
    if reply.has_error():
        return _make_error_reply(message, reply.error.code, reply.error.reason or "", start)
    return ClientAppReply(
        message,
        created_at=reply.metadata.created_at,
        ttl_s=reply.metadata.ttl,
        train_s=time.monotonic() - start,
        content=reply.content,
    )


def _make_error_reply(
    message: RoundMessage, code: int, reason: str, start: float, kind: str = ""
) -> ClientAppReply:
    return ClientAppReply(
        message,
        created_at=time.time(),
        ttl_s=message.ttl_s,
        train_s=time.monotonic() - start,
        error_code=code,
        error_reason=" ".join(reason.split())[:MAX_REASON_CHARS],
        error_kind=kind or str(code),
    )
