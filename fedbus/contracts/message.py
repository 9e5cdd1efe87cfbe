"""What a message is. An event says what is so, a command asks that something be done, a request wants an answer.

Each class of message has a *word*, which is its name on the bus, and a *family*, which
says between whom it goes; `fedbus.contracts.subjects` makes its subject of the two.

A field added later needs a default, so that old senders stay understood; a field is never
renamed or retyped: that is a new class with the next ``version``.
"""

from enum import StrEnum
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import Id


class Family(StrEnum):
    """Between whom a message goes: the token of the subject after the federation."""

    SVC = "svc"  # a request to the server side, answered on its reply subject
    SRV = "srv"  # between the agents of the server side
    CAST = "cast"  # from the server side to all clients
    CMD = "cmd"  # from the server side to one client
    CLIENT = "client"  # from one client to the server side
    LOCAL = "local"  # between the agents of one client
    LIFE = "life"  # a lifecycle has moved


CLIENT_FAMILIES = frozenset({Family.CMD, Family.CLIENT, Family.LOCAL})


class Body(BaseModel):
    """Part of a message: frozen, and deaf to fields that a newer sender has added."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_bytes="base64", val_json_bytes="base64")


class LifecycleData(Body):
    """All there is to know of one thing with a lifecycle, beside its state."""

    kind: str
    task: Id

    @property
    def thing(self) -> str:
        """Its id within its kind: the end of its subject."""
        raise NotImplementedError


class Message(Body):
    """What is said about one task."""

    word: ClassVar[str]
    family: ClassVar[Family]
    version: ClassVar[int] = 1
    durable: ClassVar[bool] = True
    """Whether the event stream keeps it. What is not kept is lost on whoever does not listen."""
    keeps_last_value: ClassVar[bool] = False
    """Of what is not durable: whether the last one of each device is kept, for whoever comes to look."""

    task: Id

    @property
    def about(self) -> str:
        """What it is about, for ``ce-subject``: the run and round where there are any."""
        told = vars(self)  # pydantic takes long to say that a field is not there
        run, number = told.get("run"), told.get("round")
        return "/".join(str(part) for part in (run or self.task, number) if part is not None)


class ClientMessage(Message):
    """What is said to, by or within one client."""

    client: Id


class Request(Message):
    """Wants an answer, and is kept nowhere: a stream that covered it would answer first."""

    family: ClassVar[Family] = Family.SVC
    durable: ClassVar[bool] = False
    server: ClassVar[AgentName]
    """The agent that answers."""
    answer: ClassVar[type[Body]]
    """What a yes looks like; a no is `Refused`."""


class ClientRequest(Request):
    """A request about the client that asks. Its id stands in the subject, so that nobody asks for another."""

    client: Id


REFUSED_HEADER: Final = "fedbus-refused"
"""The header of an answer that is a no."""


class RefusalKind(StrEnum):
    """Who can do something about a refusal."""

    CALLER = "caller"
    """The request itself is at fault: the same request is refused again."""
    RETRYABLE = "retryable"
    """The request is not at fault, and the same request may succeed later."""
    NEEDS_OPERATOR = "needs_operator"
    """The request is not at fault, and it is refused until an operator repairs what is."""


class Refused(Body):
    """The answer "no", and why. A refusal is an answer, not an error."""

    reason: str
    kind: SkipJsonSchema[RefusalKind] = Field(default=RefusalKind.CALLER, exclude=True)
    # two booleans stand for the kind on the wire
    passing: bool = False
    """True if the same request may succeed later."""
    blameless: bool = False
    """True if the request is not at fault."""

    @model_validator(mode="before")
    @classmethod
    def _relate_kind_and_booleans(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if (kind := data.get("kind")) is not None:
            return {**data, "passing": kind == RefusalKind.RETRYABLE, "blameless": kind != RefusalKind.CALLER}
        kind = RefusalKind.NEEDS_OPERATOR if data.get("blameless") else RefusalKind.CALLER
        return {**data, "kind": RefusalKind.RETRYABLE if data.get("passing") else kind}


def type_name(kind: type[Message]) -> str:
    """The CloudEvents type of a kind of message: ``dev.fedbus.fin_train.v1``."""
    return f"dev.fedbus.{kind.word}.v{kind.version}"
