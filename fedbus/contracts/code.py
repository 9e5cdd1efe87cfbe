"""Versions of a task's code: the deployed one, and the rollout of a candidate.

    steady –code_found→ rolling –stage_passed→ rolling –rollout_finished→ steady
                        rolling –rollout_reverted→ steady

A rollout has stages. In each stage a larger part of the clients, the *cohort*, gets the candidate, and a
trial run with them alone is evaluated. Then the next stage starts, or all clients return to the deployed
version. The server manager owns the lifecycle. `fedbus.stores.code.open` has the conditions for a commit
to become a candidate: it is on the ref, an allowed signer signed it, and the task's own check passes.
"""

from enum import StrEnum
from typing import ClassVar, Literal, TypedDict

from pydantic import Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.lifecycle import Lifecycle, Wait
from fedbus.contracts.message import Body, ClientMessage, Family, LifecycleData, Message, Request

# --- which clients run which version ----------------------------------------------------


class RolloutCohort(Body):
    """The clients that get a candidate: those that have all *labels* and a rank of at most *up_to*.

    The rank of a client is a number in [0, 1) that is derived from its id and the code version, see
    `fedbus.domain.code_rollout`. So a message of constant size selects among any number of clients, including
    clients that enroll later.
    """

    labels: dict[str, str] = Field(default_factory=dict)
    up_to: float = Field(default=1.0, ge=0, le=1)


class CodePlan(Body):
    """The code version of each client: *candidate* for the clients in *cohort*, *code_version* for all others."""

    code_version: str
    """A full commit SHA, or ``sha256:`` and the digest of a directory."""
    candidate: str = ""
    cohort: RolloutCohort = RolloutCohort()
    new_lineage: bool = False
    """True if the candidate's models have another architecture, so that it cannot use the champion."""
    attempt: int = 0
    """The number of this rollout. A device tries a version again that it refused in an earlier rollout."""


class CodePublished(Message):
    """The deployed code is *code_version*. The clients in *cohort* switch to *candidate*, if there is one."""

    name: ClassVar[str] = "code_published"
    family: ClassVar[Family] = Family.CAST

    code_version: str
    candidate: str = ""
    """The version in rollout; empty outside a rollout."""
    cohort: RolloutCohort = RolloutCohort()
    """The clients that get *candidate*."""
    new_lineage: bool = False
    """True if the candidate's models have another architecture."""
    attempt: int = 0
    """The number of the rollout."""

    @property
    def plan(self) -> CodePlan:
        return CodePlan.model_validate(self.model_dump(include=set(CodePlan.model_fields)))


class CodeReady(ClientMessage):
    """The client has fetched, verified, prepared and checked *code_version*. It trains with it from now on."""

    name: ClassVar[str] = "code_ready"
    family: ClassVar[Family] = Family.CLIENT

    code_version: str
    attempt: int | None = None
    """The number of the rollout; None if it is not known."""


class CodeRefused(ClientMessage):
    """The client has rejected *code_version* and stays on *stays_on*."""

    name: ClassVar[str] = "code_refused"
    family: ClassVar[Family] = Family.CLIENT

    code_version: str
    reason: str
    stays_on: str = ""
    attempt: int | None = None
    """The number of the rollout; None if it is not known."""


# --- the lifecycle ------------------------------------------------------------------------


class CodeState(StrEnum):
    STEADY = "steady"
    ROLLING = "rolling"


class CodeEvent(StrEnum):
    STARTED = "started"
    CODE_FOUND = "code_found"
    CODE_REJECTED = "code_rejected"
    CODE_READ = "code_read"
    FOLLOWING_HELD_UP = "following_held_up"
    FOLLOWING_RESUMED = "following_resumed"
    STAGE_UNANSWERED = "stage_unanswered"
    STAGE_READY = "stage_ready"
    STAGE_PASSED = "stage_passed"
    ROLLOUT_FINISHED = "rollout_finished"
    ROLLOUT_REVERTED = "rollout_reverted"


class CodeData(LifecycleData):
    """The data of a task's code versions."""

    kind: Literal["code"] = "code"
    code_version: str = ""
    """The deployed version: the one of all clients outside the cohort."""
    previous: tuple[str, ...] = ()
    """Versions that were deployed before, newest first."""
    candidate: str = ""
    """The version in rollout; empty outside a rollout."""
    attempt: int = 0
    """The number of rollouts so far."""
    stages: tuple[str, ...] = ()
    stage: int = 0
    """The index of the current stage in *stages*."""
    cohort: RolloutCohort = RolloutCohort()
    clients: tuple[str, ...] = ()
    """The members of the cohort when the stage started."""
    ready: tuple[str, ...] = ()
    """The clients that the stage continues with; empty while it waits for answers."""
    refused: dict[str, str] = Field(default_factory=dict)
    """Reasons by client."""
    new_lineage: bool = False
    """True if the candidate starts a new lineage of models, with its own architecture."""
    rejected: dict[str, str] = Field(default_factory=dict)
    """Commits that are not tried again automatically, with the reason."""
    not_signed: tuple[str, ...] = ()
    """Rejected commits without the signature of an allowed signer. They are checked again when the allowed signers
    change."""
    held_up: str = ""
    """Why fedbus cannot look for new code or check it now; empty if it can."""
    source: str = ""
    """The repository and ref that fedbus follows, without credentials."""

    @property
    def key(self) -> str:
        return self.task

    @property
    def plan(self) -> CodePlan:
        return CodePlan.model_validate(self.model_dump(include=set(CodePlan.model_fields)))


class CodeChanges(TypedDict, total=False):
    """The data of a task's code versions that a transition may change."""

    code_version: str
    previous: tuple[str, ...]
    candidate: str
    attempt: int
    stages: tuple[str, ...]
    stage: int
    cohort: RolloutCohort
    clients: tuple[str, ...]
    ready: tuple[str, ...]
    refused: dict[str, str]
    new_lineage: bool
    rejected: dict[str, str]
    not_signed: tuple[str, ...]
    held_up: str


_S = CodeState
_E = CodeEvent
CODE = Lifecycle[CodeState, CodeEvent, CodeData, CodeChanges](
    kind="code",
    owner=AgentName.SERVER_MANAGER,
    initial=_S.STEADY,
    creation=_E.STARTED,
    data=CodeData,
    arrows={
        (_S.STEADY, _E.CODE_FOUND): _S.ROLLING,
        (_S.STEADY, _E.CODE_REJECTED): _S.STEADY,
        (_S.STEADY, _E.CODE_READ): _S.STEADY,
        (_S.ROLLING, _E.CODE_FOUND): _S.ROLLING,
        (_S.ROLLING, _E.CODE_REJECTED): _S.ROLLING,
        (_S.STEADY, _E.FOLLOWING_HELD_UP): _S.STEADY,
        (_S.STEADY, _E.FOLLOWING_RESUMED): _S.STEADY,
        (_S.ROLLING, _E.FOLLOWING_HELD_UP): _S.ROLLING,
        (_S.ROLLING, _E.FOLLOWING_RESUMED): _S.ROLLING,
        (_S.ROLLING, _E.STAGE_UNANSWERED): _S.ROLLING,
        (_S.ROLLING, _E.STAGE_READY): _S.ROLLING,
        (_S.ROLLING, _E.STAGE_PASSED): _S.ROLLING,
        (_S.ROLLING, _E.ROLLOUT_FINISHED): _S.STEADY,
        (_S.ROLLING, _E.ROLLOUT_REVERTED): _S.STEADY,
    },
    changes={
        _E.CODE_FOUND: {
            "candidate",
            "attempt",
            "stages",
            "new_lineage",
            "rejected",
            "not_signed",
            "stage",
            "cohort",
            "clients",
            "ready",
            "refused",
        },
        _E.CODE_REJECTED: {"rejected", "not_signed"},
        _E.CODE_READ: {"code_version"},
        _E.FOLLOWING_HELD_UP: {"held_up"},
        _E.FOLLOWING_RESUMED: {"held_up"},
        _E.STAGE_READY: {"ready", "refused"},
        _E.STAGE_PASSED: {"stage", "cohort", "clients", "ready", "refused"},
        _E.ROLLOUT_FINISHED: {
            "candidate",
            "stages",
            "stage",
            "clients",
            "ready",
            "refused",
            "new_lineage",
            "code_version",
            "previous",
        },
        _E.ROLLOUT_REVERTED: {
            "candidate",
            "stages",
            "stage",
            "clients",
            "ready",
            "refused",
            "new_lineage",
            "rejected",
        },
    },
    waits={_S.ROLLING: Wait("a trial run of the candidate", "rollout.wait-s, and the deadlines of the run")},
    failure_events=frozenset(
        {_E.CODE_REJECTED, _E.FOLLOWING_HELD_UP, _E.ROLLOUT_REVERTED, _E.STAGE_UNANSWERED}
    ),
)


# --- requests of users to the server manager ---------------------------------------------------


class CodeLookedFor(Body):
    """Reply to `look_for_code`: the commit that the ref points to."""

    found: str
    """The full commit SHA."""
    news: str = ""
    """What fedbus does with this commit, as text."""


class LookForCode(Request[CodeLookedFor]):
    """Request to look for new code in the repository now, for example after a push."""

    name: ClassVar[str] = "look_for_code"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER


class RolloutBegun(Body):
    """Reply to `roll_out_code` and `revert_code`: the rollout has started."""

    code_version: str
    stages: tuple[str, ...] = ()


class RollOutCode(Request[RolloutBegun]):
    """Request to roll out *code_version* to the clients, stage by stage, even if the ref points to another commit."""

    name: ClassVar[str] = "roll_out_code"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER

    code_version: str
    """A commit of the repository: a SHA or its prefix, a tag or a branch."""
    stages: tuple[str, ...] = ()
    """Percentages (``10%``) and label selectors (``site=lab``); empty: the stages of the task."""
    new_lineage: bool = False
    """True if the architecture may change. Then the code's own first model becomes the next version, on all clients at
    once."""


class RevertCode(Request[RolloutBegun]):
    """Request to end the rollout and to return all clients to the deployed version.

    Outside a rollout, all clients return to the version before the deployed one.
    """

    name: ClassVar[str] = "revert_code"
    responder: ClassVar[AgentName] = AgentName.SERVER_MANAGER

    to: str = ""
    """The version to return to; empty: the previous one."""
    reason: str = "reverted by hand"


# --- between the server manager and the Flower server agent -------------------------------------


class CodeChecked(Body):
    """Reply to `check_code`: the code works and builds models of this *architecture*."""

    architecture: str
    """Empty if the task names no builder, so that its architecture is not known."""
    differs: str = ""
    """The first tensor in which the architecture differs from the one to compare with, as text."""
    fixed: bool = False
    """True if the task declares its architecture as fixed."""


class CheckCode(Request[CodeChecked]):
    """Request to import the task's code at *code_version*, to build its model and to run the task's own check."""

    name: ClassVar[str] = "check_code"
    responder: ClassVar[AgentName] = AgentName.FLOWER_SERVER

    code_version: str
    like: str = ""
    """The digest of the weights whose architecture the model should have."""
