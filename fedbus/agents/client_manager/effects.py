"""Effects of the client manager: everything that the agent does for its decisions.

The three kinds of effects are described in `fedbus.agents.common.machine`.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from fedbus.agents.client_manager.events import ClientTimer, ModelAnnouncement
from fedbus.agents.common.machine import CancelTimer, FinishStartup, Log, Publish, RetryLater, StartTimer
from fedbus.contracts.client import ClientChanges, ClientEvent
from fedbus.contracts.model import ModelRef
from fedbus.contracts.task.task import Task

# --- actions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoveClient:
    """Publish a transition of the client."""

    event: ClientEvent
    changes: ClientChanges = field(default_factory=ClientChanges)
    reason: str = ""
    deadline: datetime | None = None


@dataclass(frozen=True)
class HandOverModel:
    """Publish `InferStart`, or `InferUpdate`, with the file of *model*."""

    model: ModelRef
    code_version: str
    is_first: bool = False
    """True if no model is served yet: `InferStart`."""
    term: int = 0
    published_in: str = ""


@dataclass(frozen=True)
class SwitchCode:
    """Remember on disk that the device has the version of *task*."""

    task: Task


@dataclass(frozen=True)
class ReleaseSlot:
    """Release the training slot, if there is one."""


@dataclass(frozen=True)
class JoinTrace:
    """Perform all later effects in this trace, those of a query's result included; empty: stay in the current one."""

    traceparent: str


@dataclass(frozen=True)
class OpenInbox:
    """Subscribe to messages, which are consumed after `FinishStartup`."""


@dataclass(frozen=True)
class Fail:
    """End the agent; its supervisor restarts it."""

    reason: str


# --- queries ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadDeviceFacts:
    """Read the values of an eligibility rule's variables. Result: `DeviceFactsRead`."""

    names: frozenset[str]
    model: ModelRef | None
    """The model whose age a rule may use."""
    holdout_share: float


@dataclass(frozen=True)
class TakeSlot:
    """Result: `SlotTaken` or `SlotsBusy`."""

    run: str


# --- jobs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnrollClient:
    """Enroll; repeat the request until the server answers. Result: `EnrollmentAnswered`."""


@dataclass(frozen=True)
class ReadServerInfo:
    """Result: `ServerInfoRead`."""

    until_answered: bool = False
    """Ask again while the server does not answer; False: ask once."""


@dataclass(frozen=True)
class ReadOpenRun:
    """Result: `OpenRunRead`."""


@dataclass(frozen=True)
class FetchModel:
    """Check the signature and fetch the file. Result: `ModelFetched` or `ModelNotFetched`."""

    announcement: ModelAnnouncement
    attempts: int
    """After a failed attempt, request the current address of the file from the server."""


@dataclass(frozen=True)
class PrepareCode:
    """Fetch, verify and check a version. Result: `CodePrepared` or `CodeNotPrepared`."""

    version: str
    limit_s: float


Action: TypeAlias = (
    MoveClient
    | Publish
    | HandOverModel
    | SwitchCode
    | ReleaseSlot
    | StartTimer[ClientTimer]
    | RetryLater[ClientTimer]
    | CancelTimer[ClientTimer]
    | Log
    | JoinTrace
    | OpenInbox
    | FinishStartup
    | Fail
)
Query: TypeAlias = ReadDeviceFacts | TakeSlot
Job: TypeAlias = EnrollClient | ReadServerInfo | ReadOpenRun | FetchModel | PrepareCode
Effect: TypeAlias = Action | Query | Job
