"""Base classes of messages: events, commands and requests.

An event states a fact, a command asks for an action, and a request waits for a reply.

Each message class has a *name*, the last token of its subject (``fin_train``), and a *family*, the token
that names the kinds of sender and receiver. `fedbus.contracts.subjects` builds the subject from both.

Compatibility: a new field needs a default, so that messages of older senders can be decoded. Fields are
never renamed or retyped; such a change needs a new class with the next ``version``.
"""

from enum import StrEnum
from typing import Any, ClassVar, Final, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.identifiers import Id


class Family(StrEnum):
    """Sender and receiver of a message, as the subject token after the federation."""

    SVC = "svc"  # a request to the server side, answered on its reply subject
    SRV = "srv"  # between the agents of the server side
    CAST = "cast"  # from the server side to all clients
    CMD = "cmd"  # from the server side to one client
    CLIENT = "client"  # from one client to the server side
    LOCAL = "local"  # between the agents of one client
    LIFE = "life"  # the transitions of all lifecycles


CLIENT_FAMILIES = frozenset({Family.CMD, Family.CLIENT, Family.LOCAL})


class Body(BaseModel):
    """Part of a message. Frozen; unknown fields are ignored, so that newer senders are understood."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_bytes="base64", val_json_bytes="base64")


class LifecycleData(Body):
    """The data of an entity that has a lifecycle, without its state."""

    kind: str
    task: Id

    @property
    def key(self) -> str:
        """The key of the entity, unique within its kind: the end of its subject."""
        raise NotImplementedError


class Message(Body):
    """A message about one task."""

    name: ClassVar[str]
    family: ClassVar[Family]
    version: ClassVar[int] = 1
    durable: ClassVar[bool] = True
    """True if the event stream stores it. Otherwise only current subscribers receive it."""
    keeps_last_value: ClassVar[bool] = False
    """True if the device stream stores the last one of each device. Only for messages that are not durable."""

    task: Id

    @property
    def subject_ref(self) -> str:
        """The value of ``ce-subject``: run and round, or the task where there is no run."""
        values = vars(self)  # getattr for a missing field is slow in pydantic
        run, number = values.get("run"), values.get("round")
        return "/".join(str(part) for part in (run or self.task, number) if part is not None)


class ClientMessage(Message):
    """A message from, to or within one client."""

    client: Id


ReplyT_co = TypeVar("ReplyT_co", bound=Body, covariant=True)


class Request(Message, Generic[ReplyT_co]):
    """A request whose reply is a *ReplyT_co*; a refusal is a `Refused`.

    No stream stores it, because the acknowledgement of a stream would arrive as the reply.
    """

    family: ClassVar[Family] = Family.SVC
    durable: ClassVar[bool] = False
    responder: ClassVar[AgentName]
    """The agent that answers."""
    reply_type: ClassVar[type[Body]]
    """The type parameter, as an object."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if arguments := cls.__pydantic_generic_metadata__["args"]:
            (cls.reply_type,) = arguments


class ClientRequest(Request[ReplyT_co], Generic[ReplyT_co]):
    """A request about the requesting client. Its id is part of the subject, so permissions limit it to that client."""

    client: Id


REFUSED_HEADER: Final = "fedbus-refused"
"""The header that marks a reply as a refusal."""


class RefusalKind(StrEnum):
    """Who can remove the cause of a refusal."""

    CALLER = "caller"
    """The request is wrong. The same request would be refused again."""
    RETRYABLE = "retryable"
    """The request is correct. The same request may succeed later."""
    NEEDS_OPERATOR = "needs_operator"
    """The request is correct. It is refused until an operator repairs the cause."""


class Refused(Body):
    """The reply that refuses a request, with the reason. A refusal is a reply, not an error."""

    reason: str
    kind: SkipJsonSchema[RefusalKind] = Field(default=RefusalKind.CALLER, exclude=True)
    # the wire format has two booleans in place of the kind
    passing: bool = False
    """True if the same request may succeed later."""
    blameless: bool = False
    """True if the request is correct and the cause of the refusal is elsewhere."""

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
    """Return the CloudEvents type of a message class: ``dev.fedbus.fin_train.v1``."""
    return f"dev.fedbus.{kind.name}.v{kind.version}"
