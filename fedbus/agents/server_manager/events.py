"""Events of the server manager: everything that its decisions depend on.

Messages of the bus are events themselves. The others are requests with the id of their reply, results of
effects, and timers. All are frozen, so that a test can write down a run as a list of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from fedbus.agents.common.machine import RequestId, TimerFired
from fedbus.contracts.champion import Champion, PromoteModel, RollBackModel, StartLineage
from fedbus.contracts.client import ClientJoined, FailTrain
from fedbus.contracts.code import CodeReady, CodeRefused
from fedbus.contracts.flower_server import RoundFinished, RunFailed, RunFinished, ServerLost, ServerStarted
from fedbus.contracts.message import Refused
from fedbus.contracts.model import BlobRef, Manifest, ModelRef
from fedbus.contracts.server import CancelRun, OpenRun, StoreProblem
from fedbus.contracts.task.task import Task
from fedbus.domain.model_promotion import PromotionVerdict


class TimerName(StrEnum):
    RECRUITING = "recruiting deadline"
    STORE = "check the model store again"
    STAGE = "rollout stage deadline"
    CANDIDATE = "try the candidate"


@dataclass(frozen=True)
class ChampionDetails:
    """The champion with its manifest."""

    champion: Champion
    manifest: Manifest


@dataclass(frozen=True)
class ProposedVersion:
    """A code version that may be rolled out when no run is active."""

    task: Task
    stages: tuple[str, ...]
    new_lineage: bool = False
    revert_reason: str = ""
    """Why the current version is rejected by this rollout; empty if it is not rejected."""


@dataclass(frozen=True)
class CodeUnusable:
    """A code version that the log names cannot be loaded."""

    reason: str


# --- the start of the agent -------------------------------------------------------------------------


@dataclass(frozen=True)
class ManagerStarted:
    """The agent has read its lifecycles, and the code that they name."""

    deployed: Task | CodeUnusable
    """The version that the log names."""
    candidate: Task | CodeUnusable | None = None
    """The version that is rolled out."""
    answers: tuple[CodeReady | CodeRefused, ...] = ()
    """The last answer of each client."""


@dataclass(frozen=True)
class JoinedRead:
    """The last `joined` message of each client, as the log has it."""

    messages: tuple[ClientJoined, ...]


# --- requests ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRequested:
    id: RequestId
    request: OpenRun
    traceparent: str
    """The trace of the request, which the run continues."""


@dataclass(frozen=True)
class CancelRequested:
    id: RequestId
    request: CancelRun


@dataclass(frozen=True)
class PromotionRequested:
    id: RequestId
    request: PromoteModel | RollBackModel


@dataclass(frozen=True)
class LineageRequested:
    id: RequestId
    request: StartLineage


@dataclass(frozen=True)
class RevertRequested:
    """End the current rollout."""

    id: RequestId
    reason: str


# --- the code watcher -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeProposed:
    """A version is verified and has passed its check."""

    proposal: ProposedVersion


@dataclass(frozen=True)
class CodeRejectedByCheck:
    """A commit may not become a version."""

    version: str
    reason: str
    is_unsigned: bool = False
    """True if no allowed signer signed it: it is checked again when the allowed signers change."""


@dataclass(frozen=True)
class FollowingPaused:
    """The code repository or the check is unavailable."""

    reason: str


@dataclass(frozen=True)
class FollowingResumed:
    """Both are available."""


@dataclass(frozen=True)
class FleetRead:
    """The labels of every client that is not terminated."""

    labels: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class CandidateRunAnswered:
    """The scheduler has answered the request for a run of the candidate."""

    refusal: str = ""
    """Why there is none now; empty if one starts."""


# --- results: the model store -----------------------------------------------------------------------


@dataclass(frozen=True)
class FirstModelReady:
    """The store has a champion."""

    served: ChampionDetails
    code_version: str


@dataclass(frozen=True)
class FirstModelFailed:
    """There is no champion yet."""

    reason: str
    trouble: StoreProblem | None
    """None if the store is usable and the model could not be built."""


@dataclass(frozen=True)
class StoreChecked:
    """The store was compared with the log."""

    model: ModelRef
    """The champion of the log when the check began."""
    served: ChampionDetails | None
    """The champion of the store; None if it could not be read."""
    has_file: bool
    """True if the weights of the champion are on this machine."""
    reason: str = ""
    """Why the store is unusable; empty if it is usable."""
    trouble: StoreProblem | None = None


@dataclass(frozen=True)
class ModelOffered:
    model: ModelRef
    blob: BlobRef


@dataclass(frozen=True)
class OfferFailed:
    reason: str
    trouble: StoreProblem


@dataclass(frozen=True)
class VersionPublished:
    """The result of a run is a version of the store."""

    manifest: Manifest
    verdict: PromotionVerdict
    served: ChampionDetails | None
    """The new champion; None if the version was not promoted."""
    keep: int
    """How many versions the task keeps."""


@dataclass(frozen=True)
class PublishFailed:
    reason: str


@dataclass(frozen=True)
class VersionsRetired:
    """Old versions are deleted, or will be after the next run."""


@dataclass(frozen=True)
class PromotionChecked:
    """The version can be loaded by the deployed code."""

    version: int


@dataclass(frozen=True)
class PromotionRefused:
    reason: str


@dataclass(frozen=True)
class VersionPromoted:
    """The champion of the store is another."""

    served: ChampionDetails


@dataclass(frozen=True)
class LineageBuilt:
    """The store has the first model of a new lineage, as champion."""

    served: ChampionDetails
    code_version: str


@dataclass(frozen=True)
class LineageFailed:
    reason: str


# --- results: the Flower server ---------------------------------------------------------------------


@dataclass(frozen=True)
class FitChecked:
    """The code of a run was compared with the champion."""

    difference: str = ""
    """The first tensor that differs; empty if the code makes such a model."""
    store_error: str = ""
    """Why the store could not be asked."""


@dataclass(frozen=True)
class StartupFitChecked:
    """The same, for the log only."""

    difference: str
    model: ModelRef


@dataclass(frozen=True)
class FlowerServerStarted:
    """The Flower server agent starts the server of *run*."""

    run: str


@dataclass(frozen=True)
class FlowerServerNotStarted:
    run: str
    refusal: Refused


@dataclass(frozen=True)
class FlowerServerFound:
    run: str
    is_up: bool
    reason: str
    """Why it was looked for."""


@dataclass(frozen=True)
class RecruitsRead:
    """The clients of the task, and what they have published about the run that recruits."""

    declined: Mapping[str, str]
    """Reasons by client."""
    load_failures: Mapping[str, str]
    """The reasons of the clients that cannot load the task's code."""
    loading: frozenset[str]
    """The clients whose trainers have started for the run. Some of them have joined."""
    known: frozenset[str]
    """All clients that are not terminated."""


Request: TypeAlias = RunRequested | CancelRequested | PromotionRequested | LineageRequested | RevertRequested
RunMessage: TypeAlias = (
    ServerStarted | ClientJoined | FailTrain | RoundFinished | RunFinished | RunFailed | ServerLost
)
CodeMessage: TypeAlias = CodeReady | CodeRefused
Event: TypeAlias = (
    ManagerStarted
    | JoinedRead
    | Request
    | RunMessage
    | CodeMessage
    | CodeProposed
    | CodeRejectedByCheck
    | FollowingPaused
    | FollowingResumed
    | FleetRead
    | CandidateRunAnswered
    | FirstModelReady
    | FirstModelFailed
    | StoreChecked
    | ModelOffered
    | OfferFailed
    | VersionPublished
    | PublishFailed
    | VersionsRetired
    | PromotionChecked
    | PromotionRefused
    | VersionPromoted
    | LineageBuilt
    | LineageFailed
    | FitChecked
    | StartupFitChecked
    | FlowerServerStarted
    | FlowerServerNotStarted
    | FlowerServerFound
    | RecruitsRead
    | TimerFired[TimerName]
)
