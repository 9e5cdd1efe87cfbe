"""Versions of a task's code: which one everybody is to be on, and how a new one comes to them.

    steady –code_found→ rolling –stage_passed→ rolling –rollout_finished→ steady
                        rolling –rollout_reverted→ steady

A new version comes to part of the clients first, the *cohort*; a run is trained with them alone
and judged, then the next stage begins, or everybody goes back. The server manager owns the
lifecycle. What a commit must be to become a version at all (on the ref, signed by an allowed
signer, passing the task's own check) stands in `fedbus.stores.code.open`.
"""

from enum import StrEnum
from typing import ClassVar, Literal, TypedDict

from pydantic import Field

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.lifecycle import Lifecycle, Wait
from fedbus.contracts.message import Body, ClientMessage, Family, LifecycleData, Message, Request

# --- what is to run where --------------------------------------------------------------


class RolloutCohort(Body):
    """The clients that a version is for: those with all *labels* whose rank is at most *up_to*.

    A client's rank is a number in [0, 1) drawn from its id and the version (see `fedbus.domain.code_rollout`), so
    that a word of constant size tells a thousand clients apart, and those that come later too.
    """

    labels: dict[str, str] = Field(default_factory=dict)
    up_to: float = Field(default=1.0, ge=0, le=1)


class CodePlan(Body):
    """Which code belongs where: *candidate* on the clients of *cohort*, *code_version* on all others."""

    code_version: str
    """A full commit SHA, or ``sha256:`` and a digest where there is no Git."""
    candidate: str = ""
    cohort: RolloutCohort = RolloutCohort()
    new_lineage: bool = False
    """Whether the candidate's models have another architecture: the model that is served will not fit it."""
    attempt: int = 0
    """Which rollout of the task's this is: what a device refused in an earlier one it tries again."""


class CodePublished(Message):
    """The task's code is now at *code_version*; the clients of *cohort* try *candidate*, if there is one."""

    word: ClassVar[str] = "code_published"
    family: ClassVar[Family] = Family.CAST

    code_version: str
    candidate: str = ""
    cohort: RolloutCohort = RolloutCohort()
    new_lineage: bool = False
    attempt: int = 0

    @property
    def plan(self) -> CodePlan:
        return CodePlan.model_validate(self.model_dump(include=set(CodePlan.model_fields)))


class CodeReady(ClientMessage):
    """This client has fetched, verified, prepared and checked *code_version*, and trains with it from now on."""

    word: ClassVar[str] = "code_ready"
    family: ClassVar[Family] = Family.CLIENT

    code_version: str
    attempt: int | None = None
    """The rollout in which it was asked for, where that is known."""


class CodeRefused(ClientMessage):
    """This client does not take *code_version*, and stays on *stays_on*."""

    word: ClassVar[str] = "code_refused"
    family: ClassVar[Family] = Family.CLIENT

    code_version: str
    reason: str
    stays_on: str = ""
    attempt: int | None = None
    """The rollout in which it was asked for, where that is known."""


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
    """All there is to know of a task's code versions."""

    kind: Literal["code"] = "code"
    code_version: str = ""
    """What everybody is on, outside a rollout's cohort."""
    previous: tuple[str, ...] = ()
    """What everybody was on before, newest first."""
    candidate: str = ""
    """What is being rolled out."""
    attempt: int = 0
    """How many rollouts there have been."""
    stages: tuple[str, ...] = ()
    stage: int = 0
    """Which of *stages* is under way, counted from 0."""
    cohort: RolloutCohort = RolloutCohort()
    clients: tuple[str, ...] = ()
    """Who was in the cohort when the stage began."""
    ready: tuple[str, ...] = ()
    refused: dict[str, str] = Field(default_factory=dict)
    """Reasons by client."""
    new_lineage: bool = False
    """Whether the candidate begins a new lineage of models with its own architecture."""
    rejected: dict[str, str] = Field(default_factory=dict)
    """Commits that will not be tried again by themselves, and why."""
    not_signed: tuple[str, ...] = ()
    """Those of them that no allowed signer had signed: they are looked at again when the allowed signers change."""
    held_up: str = ""
    """Why new code cannot be looked for or checked now; empty where it can."""
    source: str = ""
    """The repository and ref that is followed, without credentials."""

    @property
    def thing(self) -> str:
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
    waits={
        _S.ROLLING: Wait(
            "a run of the candidate to judge it by", "rollout.wait-s, and the run's own deadlines"
        )
    },
    failures=frozenset({_E.CODE_REJECTED, _E.FOLLOWING_HELD_UP, _E.ROLLOUT_REVERTED, _E.STAGE_UNANSWERED}),
)


# --- what a user asks of the server manager ---------------------------------------------------


class CodeLookedFor(Body):
    """The answer to look_for_code: what the ref was found at."""

    found: str
    """The full SHA."""
    news: str = ""
    """What comes of it, in words."""


class LookForCode(Request):
    """Look at the code repository now: somebody has pushed."""

    word: ClassVar[str] = "look_for_code"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = CodeLookedFor


class RolloutBegun(Body):
    """The answer to roll_out_code and revert_code."""

    code_version: str
    stages: tuple[str, ...] = ()


class RollOutCode(Request):
    """Bring *code_version* to the clients, stage by stage, whatever the ref says."""

    word: ClassVar[str] = "roll_out_code"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = RolloutBegun

    code_version: str
    """A commit of the repository: a SHA or the beginning of one, a tag or a branch."""
    stages: tuple[str, ...] = ()
    """Percentages (``10%``) and label selectors (``site=lab``); left out: the task's own."""
    new_lineage: bool = False
    """Whether it may bring another architecture: then its own first model is the next version, everywhere at once."""


class RevertCode(Request):
    """End the rollout and bring everybody back; without a rollout, to the version before this one."""

    word: ClassVar[str] = "revert_code"
    server: ClassVar[AgentName] = AgentName.SERVER_MANAGER
    answer: ClassVar[type[Body]] = RolloutBegun

    to: str = ""
    """Another version to go to; left out: the one before."""
    reason: str = "reverted by hand"


# --- between the server manager and the Flower server wrapper -----------------------------------


class CodeChecked(Body):
    """The answer to check_code: the task's code works, and makes models of this *architecture*."""

    architecture: str
    differs: str = ""
    """Where its model is not like the one that was to be compared with: the first tensor that differs, in words."""


class CheckCode(Request):
    """Import the task's code at *code_version*, build its model, run its own check."""

    word: ClassVar[str] = "check_code"
    server: ClassVar[AgentName] = AgentName.FLOWER_SERVER
    answer: ClassVar[type[Body]] = CodeChecked

    code_version: str
    like: str = ""
    """The digest of the weights that its model should have the architecture of."""
