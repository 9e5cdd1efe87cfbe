"""Where a client stands, asked of the server side.

Whoever may read the life stream itself may have the answer sent wherever he likes, the API that
makes consumers included, and so could read everything: a client with credentials is never
allowed to. It asks the registrar, beside the server manager, which answers to
inboxes and to no other place.
"""

from typing import ClassVar, Literal

from pydantic import Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.message import Body, ClientRequest


class LastTransition(Body):
    """The answer to recall_life: the last transition as it was said; nothing, where none was."""

    sequence: int = 0
    """Its place in the life stream."""
    headers: dict[str, str] = Field(default_factory=dict)
    body: bytes = b""
    answered_at: float = 0.0
    """By the clock of the server side, in seconds since 1970; 0 where it does not say: a device may ask no other."""


class GetLastTransition(ClientRequest):
    """Tell a client the last transition of one of its own things."""

    word: ClassVar[str] = "recall_life"
    server: ClassVar[AgentName] = AgentName.REGISTRAR
    answer: ClassVar[type[Body]] = LastTransition

    kind: Literal["client", "fl_client", "inference"]
