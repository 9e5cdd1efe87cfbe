"""Effects of the server manager: everything that the agent does for its decisions.

The three kinds of effects are described in `fedbus.agents.common.machine`.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from fedbus.agents.common.machine import (
    CancelTimer,
    FinishStartup,
    Log,
    Publish,
    Reply,
    RetryLater,
    StartTimer,
)
from fedbus.agents.server_manager.events import TimerName
from fedbus.contracts.code import CodeChanges, CodeEvent
from fedbus.contracts.flower_server import StartServer
from fedbus.contracts.model import ModelRef
from fedbus.contracts.run import RoundResult
from fedbus.contracts.server import ServerChanges, ServerEvent
from fedbus.contracts.situations import ServerPublishing
from fedbus.contracts.task.task import Task
from fedbus.domain.run_outcome import RunOutcome

# --- actions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoveServer:
    """Publish a transition of the server."""

    event: ServerEvent
    changes: ServerChanges = field(default_factory=ServerChanges)
    reason: str = ""
    deadline: datetime | None = None


@dataclass(frozen=True)
class MoveCode:
    """Publish a transition of the code."""

    event: CodeEvent
    changes: CodeChanges = field(default_factory=CodeChanges)
    reason: str = ""


@dataclass(frozen=True)
class CancelCandidateRunRequest:
    """Stop a `RequestCandidateRun` that has no answer yet."""


@dataclass(frozen=True)
class StopFlowerServer:
    run: str


@dataclass(frozen=True)
class RecordRound:
    """Update the metrics of a round."""

    result: RoundResult


@dataclass(frozen=True)
class RecordRun:
    """Update the metrics of a run that has ended."""

    outcome: RunOutcome


# --- queries ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadJoined:
    """Result: `JoinedRead`."""


@dataclass(frozen=True)
class ReadRecruits:
    """Result: `RecruitsRead`."""

    run: str


@dataclass(frozen=True)
class ReadFleet:
    """Result: `FleetRead`."""


@dataclass(frozen=True)
class OfferModel:
    """Offer *model* to all clients. Result: `ModelOffered` or `OfferFailed`."""

    model: ModelRef
    receivers: int
    """The number of clients that may fetch it at once."""


@dataclass(frozen=True)
class PromoteVersion:
    """Make *version* the champion of the store. Result: `VersionPromoted` or `PromotionRefused`."""

    version: int
    reason: str


# --- jobs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildFirstModel:
    """Read the champion, or build a first model if the store is empty.

    Result: `FirstModelReady` or `FirstModelFailed`.
    """

    code_version: str


@dataclass(frozen=True)
class CheckStore:
    """Compare the store with the log. Result: `StoreChecked`."""

    model: ModelRef
    term: int


@dataclass(frozen=True)
class CheckFit:
    """Compare the model that *code_version* makes with the champion. Result: `FitChecked`."""

    code_version: str
    model: ModelRef


@dataclass(frozen=True)
class CheckFitAtStartup:
    """The same, for the log. Result: `StartupFitChecked` if there is a difference."""

    code_version: str
    model: ModelRef


@dataclass(frozen=True)
class StartFlowerServer:
    """Result: `FlowerServerStarted` or `FlowerServerNotStarted`."""

    request: StartServer


@dataclass(frozen=True)
class FindFlowerServer:
    """Result: `FlowerServerFound`."""

    run: str
    reason: str


@dataclass(frozen=True)
class ReportFlowerServer:
    """Request a report of a lost Flower server as `ServerLost`, after all of its own messages. No result."""

    run: str


@dataclass(frozen=True)
class PublishVersion:
    """Publish the result of a run as a version, and promote it if the task's gate allows it.

    Result: `VersionPublished` or `PublishFailed`.
    """

    run: ServerPublishing
    task: Task | None
    """The task at the code version of the run; None if it must be read from the code repository."""


@dataclass(frozen=True)
class CheckPromotion:
    """Find *version*, and compare it with the deployed code if its architecture is not the champion's.

    Result: `PromotionChecked` or `PromotionRefused`.
    """

    version: int | None
    """None: the champion before this one."""
    champion: ModelRef
    code_version: str


@dataclass(frozen=True)
class BuildLineage:
    """Build the first model of a new lineage, and promote it. Result: `LineageBuilt` or `LineageFailed`."""

    code_version: str


@dataclass(frozen=True)
class RetireVersions:
    """Delete old versions. Result: `VersionsRetired`."""

    keep: int
    spare: frozenset[str]
    """Digests of weights that must stay."""


@dataclass(frozen=True)
class RequestCandidateRun:
    """Ask the scheduler for a run of the candidate. Result: `CandidateRunAnswered`."""


@dataclass(frozen=True)
class PruneCode:
    """Delete code that is no longer in use. No result."""


Action: TypeAlias = (
    MoveServer
    | MoveCode
    | Publish
    | Reply
    | StartTimer[TimerName]
    | RetryLater[TimerName]
    | CancelTimer[TimerName]
    | CancelCandidateRunRequest
    | StopFlowerServer
    | RecordRound
    | RecordRun
    | Log
    | FinishStartup
)
Query: TypeAlias = ReadJoined | ReadRecruits | ReadFleet | OfferModel | PromoteVersion
Job: TypeAlias = (
    BuildFirstModel
    | CheckStore
    | CheckFit
    | CheckFitAtStartup
    | StartFlowerServer
    | FindFlowerServer
    | ReportFlowerServer
    | PublishVersion
    | CheckPromotion
    | BuildLineage
    | RetireVersions
    | RequestCandidateRun
    | PruneCode
)
Effect: TypeAlias = Action | Query | Job
