"""The request with which a client reads the last transition of its own entities.

A client has no permission to read the life stream. The JetStream API sends its response to any reply
subject, including the API subject that creates consumers, so such a permission would give access to all
messages. The client sends the request to the registrar, which replies to inboxes only.
"""

from typing import ClassVar, Literal

from pydantic import Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.message import Body, ClientRequest


class LastTransition(Body):
    """Reply to `recall_life`: the last transition, as it is stored. All fields are empty if there is none."""

    sequence: int = 0
    """The sequence number of the transition in the life stream."""
    headers: dict[str, str] = Field(default_factory=dict)
    body: bytes = b""
    answered_at: float = 0.0
    """The time of the reply in seconds since the epoch, by the clock of the server side. A device has no other way to
    compare its clock. 0 if unknown."""


class GetLastTransition(ClientRequest[LastTransition]):
    """Request for the last transition of one of the requesting client's own entities."""

    name: ClassVar[str] = "recall_life"
    responder: ClassVar[AgentName] = AgentName.REGISTRAR

    kind: Literal["client", "fl_client", "inference"]
