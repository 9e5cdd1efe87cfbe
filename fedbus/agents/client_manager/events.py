"""Events of the client manager: everything that its decisions depend on.

Messages of the bus are events themselves, except for `ModelPublished`, which gets its trace. The others are
results of effects, and timers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from fedbus.agents.common.machine import TimerFired
from fedbus.contracts.client import FailTrain, FinTrain, InferReady, InferRefused
from fedbus.contracts.code import CodePublished
from fedbus.contracts.model import BlobRef, ModelRef, ModelSignature
from fedbus.contracts.server import ServerInfo, UpdateReady
from fedbus.contracts.serving import ModelRolledBack
from fedbus.contracts.task.task import Task


class ClientTimer(StrEnum):
    BOOTSTRAP = "bootstrap deadline"
    MODEL = "ask for the first model again"
    APPLY = "inference deadline"
    REFUSED = "hand over the refused model again"
    VERSION = "model version deadline"
    LEARN = "run deadline"
    ELIGIBLE = "check the eligibility again"


@dataclass(frozen=True)
class ModelAnnouncement:
    """A model that the server has announced as its champion."""

    model: ModelRef
    blob: BlobRef
    term: int
    """Of two announcements, the one with the higher term is valid."""
    signature: ModelSignature | None
    traceparent: str = ""
    """The trace of the announcement (W3C Trace Context)."""


# --- the start of the agent -------------------------------------------------------------------------


@dataclass(frozen=True)
class ClientManagerStarted:
    """The agent has read its lifecycle."""


@dataclass(frozen=True)
class EnrollmentAnswered:
    refusal: str = ""
    """Why the server does not accept the client; empty if it does."""


# --- messages that need more than their content -----------------------------------------------------


@dataclass(frozen=True)
class ModelAnnounced:
    """`ModelPublished`, with its trace."""

    announcement: ModelAnnouncement


# --- results: the server ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerInfoRead:
    info: ServerInfo | None
    """None if the server refused, or did not answer in time."""
    reason: str = ""
    """Why there is none."""


@dataclass(frozen=True)
class OpenRunRead:
    """The run that recruits clients now."""

    invitation: UpdateReady | None


# --- results: models and code -----------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFetched:
    """The model is a verified file on this device."""

    model: ModelRef


@dataclass(frozen=True)
class ModelNotFetched:
    model: ModelRef
    reason: str


@dataclass(frozen=True)
class CodePrepared:
    """The version is fetched, verified and has passed its check."""

    task: Task


@dataclass(frozen=True)
class CodeNotPrepared:
    version: str
    reason: str


# --- results: the device ----------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceFactsRead:
    facts: Mapping[str, float | None]
    """By the variables of the eligibility rule; None for a fact that this device cannot measure."""


@dataclass(frozen=True)
class SlotTaken:
    """The device has a training slot for the run."""


@dataclass(frozen=True)
class SlotsBusy:
    """Other tasks of this device have all training slots."""

    holders: tuple[str, ...]
    """Their runs."""
    limit: int


Event: TypeAlias = (
    ClientManagerStarted
    | EnrollmentAnswered
    | UpdateReady
    | ModelAnnounced
    | CodePublished
    | FinTrain
    | FailTrain
    | InferReady
    | InferRefused
    | ModelRolledBack
    | ServerInfoRead
    | OpenRunRead
    | ModelFetched
    | ModelNotFetched
    | CodePrepared
    | CodeNotPrepared
    | DeviceFactsRead
    | SlotTaken
    | SlotsBusy
    | TimerFired[ClientTimer]
)
