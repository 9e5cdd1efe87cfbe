"""Which of a task's model versions is served: the *champion*, and how another takes its place.

A run makes a candidate; the gate of the task promotes it to champion or keeps it back. A person may
promote any version, go back to the champion before, or have a new lineage begin. The server
manager answers, and tells the clients by `model_published`, whichever way it came about.
"""

from typing import ClassVar

from pydantic import AwareDatetime, Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.message import Body, Request
from fedbus.contracts.model import ModelRef


class Champion(Body):
    """The pointer in the model repository, moved by compare-and-set on *term*."""

    version: int = Field(ge=1)
    term: int = Field(ge=1)
    """Counts the champions there have been, whichever versions they were: the higher one is the newer word."""
    before: tuple[int, ...] = ()
    """The versions that were champion before, newest first, each once; bounded."""
    since: AwareDatetime
    reason: str = ""


class ModelPromoted(Body):
    """The answer to promote_model, roll_back_model and start_lineage: this is served from now on."""

    model: ModelRef
    instead_of: int | None = None


class PromoteModel(Request):
    """Serve *model_version* from now on, whatever the gate said of it, or a device that went back from it."""

    word: ClassVar[str] = "promote_model"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = ModelPromoted

    model_version: int = Field(ge=1)
    reason: str = "promoted by hand"


class RollBackModel(Request):
    """Serve the champion before this one again, or *to*."""

    word: ClassVar[str] = "roll_back_model"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = ModelPromoted

    to: int | None = Field(default=None, ge=1)
    reason: str = "rolled back by hand"


class StartLineage(Request):
    """Build a first model anew, of whatever architecture the code has now, and serve it."""

    word: ClassVar[str] = "start_lineage"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = ModelPromoted

    reason: str = "a new lineage was asked for"
