"""Steps of the client manager: what it waits for in a state of its lifecycle, with the data of that wait."""

from dataclasses import dataclass, field
from typing import TypeAlias

from fedbus.agents.client_manager.events import ModelAnnouncement
from fedbus.contracts.client import ClientState
from fedbus.contracts.model import ModelRef
from fedbus.contracts.server import UpdateReady
from fedbus.contracts.task.task import Task


@dataclass(frozen=True)
class Search:
    """The search for the first model, over all its attempts."""

    attempt: int = 0
    reason: str = ""
    """Why the last attempt failed."""


# --- s0, and pending_application before the first served model-------------------------------------


@dataclass(frozen=True)
class Created:
    """The agent has not started."""


@dataclass(frozen=True)
class Enrolling:
    """The server has not accepted the client yet."""


@dataclass(frozen=True)
class AskingServer:
    """The server is asked for its champion."""

    search: Search = field(default_factory=Search)


@dataclass(frozen=True)
class CatchingUp:
    """The code changed while the device was disconnected, and is prepared before the model is fetched."""

    announcement: ModelAnnouncement
    version: str
    search: Search


@dataclass(frozen=True)
class FetchingFirst:
    announcement: ModelAnnouncement
    search: Search


@dataclass(frozen=True)
class SearchFailed:
    """A timer runs until the next attempt."""

    search: Search


# --- pending_application ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fetching:
    announcement: ModelAnnouncement


@dataclass(frozen=True)
class Applying:
    """The inference agent has the file of the model."""

    model: ModelRef


@dataclass(frozen=True)
class FirstRefused:
    """The inference agent serves nothing and refused the model; a timer runs until the next search."""


@dataclass(frozen=True)
class AwaitingVersion:
    """A run has ended, and its model version is not announced yet."""


# --- serving ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The client is idle and may join a run."""


@dataclass(frozen=True)
class CheckingRule:
    """The device is read for the task's eligibility rule."""

    invitation: UpdateReady


@dataclass(frozen=True)
class TakingSlot:
    invitation: UpdateReady


# --- syncing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparingCode:
    version: str


@dataclass(frozen=True)
class TryingCode:
    """The inference agent tries the champion with the new code."""

    task: Task


@dataclass(frozen=True)
class ChangingCode:
    """The device has the new code, and the server is asked for its champion."""


# --- learning ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    run: str
    limit_s: float


@dataclass(frozen=True)
class Ended:
    """The client is terminated."""


Searching: TypeAlias = AskingServer | CatchingUp | FetchingFirst | SearchFailed
Step: TypeAlias = (
    Created
    | Enrolling
    | Searching
    | Fetching
    | Applying
    | FirstRefused
    | AwaitingVersion
    | Ready
    | CheckingRule
    | TakingSlot
    | PreparingCode
    | TryingCode
    | ChangingCode
    | Training
    | Ended
)

_SEARCHING = (AskingServer, CatchingUp, FetchingFirst, SearchFailed)
STEPS: dict[ClientState, tuple[type[Step], ...]] = {
    ClientState.S0: (Created, Enrolling, *_SEARCHING),
    ClientState.PENDING_APPLICATION: (*_SEARCHING, Fetching, Applying, FirstRefused, AwaitingVersion),
    ClientState.SERVING: (Ready, CheckingRule, TakingSlot),
    ClientState.SYNCING: (PreparingCode, TryingCode, ChangingCode),
    ClientState.LEARNING: (Training,),
    ClientState.TERMINATED: (Ended,),
}
"""The steps that belong to each state. `Created` belongs to any: the log may name any state."""
