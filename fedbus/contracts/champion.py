"""The *champion* of a task, which is the version that clients serve, and the requests that replace it.

A run produces a candidate; the gate of the task promotes or rejects it. A user may promote any version,
return to the previous champion or start a new lineage. In each case the server manager publishes
`model_published` to all clients.
"""

from typing import ClassVar

from pydantic import AwareDatetime, Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.message import Body, Request
from fedbus.contracts.model import ModelRef


class Champion(Body):
    """The champion pointer in the model repository. It is replaced by compare-and-set on *term*."""

    version: int = Field(ge=1)
    term: int = Field(ge=1)
    """The number of champions so far, counting repeated versions too. A higher term is newer."""
    before: tuple[int, ...] = ()
    """Versions that were champion before, newest first, without repetition; bounded."""
    since: AwareDatetime
    reason: str = ""


class ModelPromoted(Body):
    """Reply to `promote_model`, `roll_back_model` and `start_lineage`: *model* is the champion."""

    model: ModelRef
    instead_of: int | None = None
    """The version of the previous champion."""


class PromoteModel(Request[ModelPromoted]):
    """Request to make *model_version* the champion, even if the gate rejected it or a device rolled it back."""

    name: ClassVar[str] = "promote_model"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER

    model_version: int = Field(ge=1)
    reason: str = "promoted by hand"


class RollBackModel(Request[ModelPromoted]):
    """Request to make the previous champion, or version *to*, the champion again."""

    name: ClassVar[str] = "roll_back_model"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER

    to: int | None = Field(default=None, ge=1)
    """The version to return to; None: the previous champion."""
    reason: str = "rolled back by hand"


class StartLineage(Request[ModelPromoted]):
    """Request to build a new first model with the architecture of the current code, and to make it the champion."""

    name: ClassVar[str] = "start_lineage"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER

    reason: str = "new lineage requested"
