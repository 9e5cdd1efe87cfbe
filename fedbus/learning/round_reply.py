"""Conversion between the events of a round and what the client side of a library gets and returns."""

from collections.abc import Mapping
from uuid import uuid4

from fedbus.contracts.client import RoundReply
from fedbus.contracts.round_messages import MessageContent, RoundMessage
from fedbus.contracts.run import Scalar
from fedbus.learning.library import ClientResponse, IncomingMessage


def make_incoming(
    message: RoundMessage, data: bytes | memoryview, node_config: Mapping[str, Scalar]
) -> IncomingMessage:
    """Return the message of the library, with *data* as its content."""
    return IncomingMessage(
        message_id=message.message_id,
        kind=message.message_type,
        data=data,
        round=message.round,
        group_id=message.group_id,
        ttl_s=message.ttl_s,
        created_at=message.created_at,
        node_config=node_config,
    )


def make_reply(
    message: RoundMessage, response: ClientResponse, content: MessageContent | None, *, left_out: int = 0
) -> RoundReply:
    """Build the event of *response*. *content* is its payload; None for an error."""
    error = response.error
    return RoundReply(
        task=message.task,
        client=message.client,
        run=message.run,
        round=message.round,
        message_id=uuid4().hex,
        reply_to=message.message_id,
        created_at=response.created_at,
        ttl_s=message.ttl_s if response.ttl_s is None else response.ttl_s,
        content=content,
        error_code=None if error is None else int(error.code),
        error_reason="" if error is None else error.reason,
        train_s=response.train_s or 0.0,
        left_out=left_out,
        figures=dict(response.metrics),
    )
