"""Runs a task's ClientApp, unmodified: a message of the server in, its reply out.

The host lives as long as a run, in a worker thread or process, and keeps what the app keeps
in ``context.state`` from message to message. An app that raises, or is not there, is an error
reply in Flower's own codes; the host goes on.
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
"""Of the figures, by what the client was asked to do."""

log = structlog.get_logger("fedbus.learning")


@dataclass(frozen=True)
class ClientAppReply:
    """What came of a message: content to send back, or an error."""

    asked: RoundMessage
    created_at: float
    ttl_s: float
    train_s: float
    content: RecordDict | None = None
    error_code: int | None = None
    error_reason: str = ""
    error_kind: str = ""
    """One of few: the type of what was raised, else Flower's code."""
    left_out: int = 0
    """Captured rows that the app was not given."""

    def event(self, content: MessageContent | None) -> RoundReply:
        """The reply on the bus; *content* is this answer's, packed, or None for an error."""
        return RoundReply(
            task=self.asked.task,
            client=self.asked.client,
            run=self.asked.run,
            round=self.asked.round,
            message_id=uuid4().hex,
            reply_to=self.asked.message_id,
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
        """What the app says of its training or evaluation, by its common names: ``train_loss``, ``eval_accuracy``."""
        prefix = METRIC_PREFIXES.get(self.asked.message_type.partition(".")[0])
        told = self.content.metric_records.values() if self.content is not None and prefix else ()
        return {
            name: value for one in told for name, value in normalize_metrics(one, prefix=prefix or "").items()
        }


class ClientAppHost:
    """The ClientApp of one client and run."""

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
        asked: RoundMessage,
        content: RecordDict,
        *,
        node_config: dict[str, Scalar] | None = None,
    ) -> ClientAppReply:
        """Let the app answer. Takes as long as training takes; raises nothing that an app could raise.

        *node_config*, where given, takes the place of the one before: what is on the device changes.
        """
        if node_config is not None:
            self._context.node_config = dict(node_config)
        began = time.monotonic()
        try:
            app = self._loaded()
        except task_code.BadTask as error:
            return _make_error_reply(asked, LOAD_CLIENT_APP_FAILED, str(error), began, type(error).__name__)
        try:
            reply = app(self._message(asked, content), self._context)
            return _make_reply(asked, reply, began)
        except (Exception, SystemExit) as error:
            log.warning("the ClientApp raised", run=asked.run, round=asked.round, exc_info=error)
            why = f"the ClientApp raised {task_code.format_error(error)}"
            return _make_error_reply(asked, CLIENT_APP_RAISED, why, began, type(error).__name__)

    def load(self) -> None:
        """Import the app now, before the first message; raises BadTask."""
        self._loaded()

    def _loaded(self) -> ClientApp:
        if self._app is None:
            self._app = task_code.load_client_app(self._task_path, self._reference)
        return self._app

    def _message(self, asked: RoundMessage, content: RecordDict) -> Message:
        metadata = Metadata(
            run_id=self._context.run_id,
            message_id=asked.message_id,
            src_node_id=SERVER_NODE_ID,
            dst_node_id=self._context.node_id,
            reply_to_message_id="",
            group_id=asked.group_id,
            created_at=asked.created_at,
            ttl=asked.ttl_s,
            message_type=asked.message_type,
        )
        return build_message(metadata, content=content)


def make_undelivered_reply(asked: RoundMessage, reason: str) -> ClientAppReply:
    """The answer to a message whose content did not get here."""
    return _make_error_reply(
        asked, MESSAGE_UNAVAILABLE, f"the message did not arrive: {reason}", time.monotonic()
    )


def _make_reply(asked: RoundMessage, reply: object, began: float) -> ClientAppReply:
    if not isinstance(reply, Message):
        raise TypeError(f"it returned {type(reply).__name__} where Flower wants a Message")
    if reply.has_error():
        return _make_error_reply(asked, reply.error.code, reply.error.reason or "", began)
    return ClientAppReply(
        asked,
        created_at=reply.metadata.created_at,
        ttl_s=reply.metadata.ttl,
        train_s=time.monotonic() - began,
        content=reply.content,
    )


def _make_error_reply(
    asked: RoundMessage, code: int, reason: str, began: float, kind: str = ""
) -> ClientAppReply:
    return ClientAppReply(
        asked,
        created_at=time.time(),
        ttl_s=asked.ttl_s,
        train_s=time.monotonic() - began,
        error_code=code,
        error_reason=" ".join(reason.split())[:MAX_REASON_CHARS],
        error_kind=kind or str(code),
    )
