"""The decisions of the server manager: events in, effects out. No bus, no store, no clock, no task.

    scheduler –open_run→ recruiting –quorum_reached→ training –run_finished→ publishing → waiting

`ServerMachine.handle` takes one event and returns what the agent must do. Four parts share the record
of the server: `TrainingRun` (a run from its request to its end), `CodeRollout` (which code version each client has),
`ModelPromotion` (another champion by request) and `ModelAvailability` (the champion offered to clients, and its
store). A job takes long and its result is an event; `ServerMachine.accepts` decides which events wait until then.
"""

from dataclasses import dataclass, replace
from datetime import datetime
from enum import IntEnum
from typing import assert_never

from fedbus.agents.common.machine import FinishStartup, Log, Reply, RequestId, TimerFired
from fedbus.agents.server_manager.code_rollout import CodeRollout
from fedbus.agents.server_manager.effects import BuildLineage, CheckFitAtStartup, Effect
from fedbus.agents.server_manager.events import (
    CancelRequested,
    CandidateRunAnswered,
    CodeProposed,
    CodeRejectedByCheck,
    Event,
    FirstModelFailed,
    FirstModelReady,
    FitChecked,
    FleetRead,
    FlowerServerFound,
    FlowerServerNotStarted,
    FlowerServerStarted,
    FollowingPaused,
    FollowingResumed,
    JoinedRead,
    LineageBuilt,
    LineageFailed,
    LineageRequested,
    ManagerStarted,
    ModelOffered,
    OfferFailed,
    PromotionChecked,
    PromotionRefused,
    PromotionRequested,
    PublishFailed,
    RecruitsRead,
    RevertRequested,
    RunRequested,
    StartupFitChecked,
    StoreChecked,
    TimerName,
    VersionPromoted,
    VersionPublished,
    VersionsRetired,
)
from fedbus.agents.server_manager.model_availability import (
    AnswerPromotion,
    CloseRun,
    FinishLineageRollout,
    ModelAvailability,
    RecordFirstModel,
    RecordStore,
)
from fedbus.agents.server_manager.model_promotion import ModelPromotion
from fedbus.agents.server_manager.records import CodeRecord, ServerRecord
from fedbus.agents.server_manager.training_run import TrainingRun, misfit
from fedbus.contracts.champion import ModelPromoted
from fedbus.contracts.client import ClientJoined, FailTrain
from fedbus.contracts.code import CodeReady, CodeRefused, RolloutBegun
from fedbus.contracts.flower_server import RoundFinished, RunFailed, RunFinished, ServerLost, ServerStarted
from fedbus.contracts.message import Refused
from fedbus.contracts.model import ModelRef
from fedbus.contracts.server import HealthStatus, ServerEvent, ServerInfo, ServerState
from fedbus.contracts.task.task import Task


class _Step(IntEnum):
    """The order of a start: each step starts when the effects of the previous one have their results."""

    RUN = 0
    """Continue the run, or the first model, that the log names."""
    STORE = 1
    """Compare the store with the log, and offer the champion."""
    END = 2
    """Publish the end of the last run again."""
    IDLE = 3
    """Start the work that waits for the end of a run."""
    READY = 4
    """Announce the code, and consume messages."""


@dataclass(frozen=True)
class _Startup:
    """A manager that has not consumed messages yet."""

    state: ServerState
    """The state that the log names."""
    event: ServerEvent
    reason: str
    step: _Step = _Step.RUN


class ServerMachine:
    """The server of one task, and its code.

    Args:
        task: The version of the task that the manager was started with.
        server: The server lifecycle, as the log has it.
        code: The code lifecycle, as the log has it.

    """

    def __init__(self, task: Task, server: ServerRecord, code: CodeRecord) -> None:
        self._server = server
        self._startup: _Startup | None = None
        self.rollout = CodeRollout(task, code)
        self.availability = ModelAvailability(server)
        self.promotion = ModelPromotion(server, self.availability, self.rollout)
        self.run = TrainingRun(server, self.availability, self.rollout)

    # --- what others may read -----------------------------------------------------------------------

    @property
    def champion(self) -> ModelRef | None:
        return self._server.data.model

    def health(self, now: datetime) -> HealthStatus:
        return HealthStatus(state=self._server.state, open_run=self.run.invitation(now))

    def info(self) -> ServerInfo | Refused:
        """Return what a client needs to start; a refusal while the champion is not offered."""
        data = self._server.data
        if (blob := self.availability.blob) is None:
            what = "has no model yet" if data.model is None else "cannot offer its model now"
            why = self.availability.trouble or f"its server is {self._server.state}"
            return Refused(reason=f"task {data.task} {what}: {why}")
        return ServerInfo(
            code_version=self.rollout.data.code_version,
            model=data.model,
            blob=blob,
            term=data.term,
            seal=data.seal,
            code=self.rollout.data.plan,
        )

    # --- which events wait --------------------------------------------------------------------------

    def accepts(self, event: Event) -> bool:  # noqa: PLR0911 - one line an event
        """Return False if *event* must wait for the result of a running job."""
        match event:
            case RunRequested():
                return self.run.refuses_at_once(event) or self._accepts_run(event.request.run)
            case PromotionRequested() | LineageRequested():
                return not self._is_deciding and not self._is_writing
            case (
                CancelRequested()
                | RoundFinished()
                | RunFailed()
                | ClientJoined()
                | FailTrain()
                | ServerStarted()
            ):
                return self._startup is None and not self.run.is_opening
            case RunFinished():
                return self._startup is None and not self.promotion.is_promoting
            case ServerLost():
                return self._startup is None and not self.run.is_starting and not self.run.is_finding
            case (
                CodeReady()
                | CodeRefused()
                | CodeProposed()
                | CodeRejectedByCheck()
                | FollowingPaused()
                | FollowingResumed()
                | RevertRequested()
                | CandidateRunAnswered()
            ):
                return not self._is_deciding
            case TimerFired():
                return not self._is_deciding and self._accepts_timer(event.timer)
            case StoreChecked():
                is_settled = self._startup is not None or not self._is_deciding
                return is_settled and self._server.state is not ServerState.PUBLISHING
            case _:
                return True

    @property
    def _is_deciding(self) -> bool:
        """True while a decision waits for a job, so that neither the champion nor the code may change."""
        return (
            self._startup is not None
            or self.availability.is_building
            or self.run.is_opening
            or self.promotion.is_promoting
            or self.promotion.is_building_lineage
        )

    @property
    def _is_writing(self) -> bool:
        """True while versions are published or deleted; no other version may be published or promoted then."""
        return self._server.state is ServerState.PUBLISHING or self.run.is_retiring

    def _accepts_run(self, run: str) -> bool:
        """Return False while a decision, a write, or the start of this run or of an ended run is in progress."""
        if self._is_deciding or self._is_writing:
            return False
        is_refused = not self._is_idle and run != self._server.data.run
        return is_refused or not self.run.is_starting

    def _accepts_timer(self, timer: TimerName) -> bool:
        builds = timer is TimerName.CANDIDATE and self.rollout.builds_lineage
        return not (builds and self._is_writing)

    # --- events -------------------------------------------------------------------------------------

    def handle(self, event: Event, now: datetime) -> list[Effect]:
        """Decide on *event*; the agent performs the effects in their order."""
        effects = self._react(event, now)
        while (startup := self._startup) is not None and not self._is_waiting_for_result:
            effects += self._next_step(startup)
        return effects

    def _react(self, event: Event, now: datetime) -> list[Effect]:  # noqa: PLR0911, PLR0912 - one line an event
        match event:
            case ManagerStarted():
                self._startup = _Startup(self._server.state, self._server.event, self._server.reason)
                return self.rollout.restore(event)
            case JoinedRead():
                return self.run.restore_joined(event.messages, now)
            case RunRequested():
                return self.run.on_requested(event)
            case CancelRequested():
                return self.run.cancel(event)
            case PromotionRequested():
                return self.promotion.on_requested(event)
            case LineageRequested():
                return self.promotion.on_lineage_requested(event)
            case RevertRequested():
                return self._on_revert_requested(event)
            case (
                ServerStarted()
                | ClientJoined()
                | FailTrain()
                | RoundFinished()
                | RunFinished()
                | RunFailed()
                | ServerLost()
            ):
                return self.run.handle(event, now)
            case CodeReady() | CodeRefused():
                return self.rollout.answer(event)
            case CodeProposed():
                return self.rollout.propose(event.proposal, is_idle=self._is_idle)
            case CodeRejectedByCheck():
                return self.rollout.reject(event.version, event.reason, is_unsigned=event.is_unsigned)
            case FollowingPaused():
                return self.rollout.pause_following(event.reason)
            case FollowingResumed():
                return self.rollout.resume_following()
            case FleetRead():
                return self.rollout.start_stage(event.labels)
            case CandidateRunAnswered():
                return self.rollout.on_candidate_run_answered(event.refusal, is_idle=self._is_idle)
            case FirstModelReady():
                return self.availability.on_first_model_ready(event)
            case FirstModelFailed():
                return self.availability.on_first_model_failed(event)
            case StoreChecked():
                announce = self._startup is None or event.trouble is not None
                return self._resume_if_settled(self.availability.on_checked(event, announce=announce))
            case ModelOffered() | OfferFailed():
                return self._on_offer_result(event)
            case VersionPublished():
                return self.run.on_published(event)
            case PublishFailed():
                return self.run.on_publish_failed(event.reason)
            case VersionsRetired():
                return self.run.on_retired()
            case PromotionChecked():
                return self.promotion.on_checked(event.version)
            case PromotionRefused():
                return self.promotion.on_refused(event.reason)
            case VersionPromoted():
                return self.promotion.on_promoted(event)
            case LineageBuilt():
                return self.promotion.on_lineage_built(event)
            case LineageFailed():
                return self.promotion.on_lineage_failed(event.reason)
            case FitChecked():
                return self.run.on_fit_checked(event, now)
            case StartupFitChecked():
                reason = misfit(event.model, event.difference)
                return [Log("warning", "The next run will be refused", {"reason": reason})]
            case FlowerServerStarted():
                return self.run.on_server_starting(event.run, now)
            case FlowerServerNotStarted():
                return self.run.on_server_not_started(event)
            case FlowerServerFound():
                return self.run.on_server_found(event)
            case RecruitsRead():
                return self.run.on_recruits_read(event)
            case TimerFired():
                return self._on_timer(event.timer)
            case _:
                assert_never(event)

    @property
    def _is_idle(self) -> bool:
        """True if no run is active and there is a model."""
        return self._server.state is ServerState.WAITING

    def _on_revert_requested(self, event: RevertRequested) -> list[Effect]:
        if not self.rollout.is_rolling:
            return [Reply(event.id, Refused(reason="no rollout is in progress"))]
        code_version = self.rollout.data.code_version
        return [*self.rollout.revert(event.reason), Reply(event.id, RolloutBegun(code_version=code_version))]

    def _on_timer(self, timer: TimerName) -> list[Effect]:
        match timer:
            case TimerName.RECRUITING:
                return self.run.on_recruiting_deadline()
            case TimerName.STAGE:
                return self.rollout.on_stage_deadline()
            case TimerName.CANDIDATE:
                effects = self.rollout.on_candidate_due(is_idle=self._is_idle)
                match effects:
                    case [BuildLineage() as build]:
                        return self.promotion.begin_lineage_of_rollout(build)
                    case _:
                        return effects
            case TimerName.STORE if self.champion is None:
                return self.availability.build(self.rollout.deployed_task.code_version)
            case TimerName.STORE:
                return self.availability.check()
            case _:
                assert_never(timer)

    def _on_offer_result(self, event: ModelOffered | OfferFailed) -> list[Effect]:
        then, effects = self.availability.on_offer_result(event)
        match then:
            case CloseRun():
                return effects + self.run.on_offer_result(then)
            case AnswerPromotion(id=id, previous=previous, reason=reason):
                return [*effects, *self.availability.announce(reason), *self._answer(id, previous)]
            case FinishLineageRollout(reason=reason):
                return [*effects, *self.availability.announce(reason), *self.rollout.finish()]
            case RecordFirstModel() | RecordStore():
                return self._resume_if_settled(effects)
            case None:
                return effects
            case _:
                assert_never(then)

    def _answer(self, id: RequestId, previous: int) -> list[Effect]:
        if (model := self.champion) is None:
            return []
        return [Reply(id, ModelPromoted(model=model, instead_of=previous))]

    def _resume_if_settled(self, effects: list[Effect]) -> list[Effect]:
        """Start the work that waited for the store, if the store is usable now."""
        is_settled = self._startup is None and self.availability.is_settled and self._is_idle
        return effects + self.rollout.resume() if is_settled else effects

    # --- the start ----------------------------------------------------------------------------------

    @property
    def _is_waiting_for_result(self) -> bool:
        """True while a step of the start waits for a query or a job."""
        return (
            self.run.is_restoring
            or self.run.is_publishing
            or self.availability.is_building
            or self.availability.is_checking
            or self.availability.is_offering
            or self.rollout.is_reading_fleet
        )

    def _next_step(self, startup: _Startup) -> list[Effect]:
        self._startup = replace(startup, step=_Step(startup.step + 1)) if startup.step < _Step.READY else None
        data = self._server.data
        match startup.step:
            case _Step.RUN:
                return self._continue_from_log()
            case _Step.STORE:
                return self.availability.check() if self.availability.blob is None else []
            case _Step.END:
                if startup.state is not ServerState.WAITING or data.run is None:
                    return []
                return self.run.announce_end(startup.event, startup.reason)
            case _Step.IDLE:
                if not self._is_idle or data.model is None:
                    return []
                check = CheckFitAtStartup(self.rollout.deployed_task.code_version, data.model)
                return [check, *self.rollout.resume()]
            case _Step.READY:
                return [*self.rollout.announce(), FinishStartup()]
            case _:
                assert_never(startup.step)

    def _continue_from_log(self) -> list[Effect]:
        match self._server.state:
            case ServerState.MODEL_INIT:
                return self.availability.build(self.rollout.deployed_task.code_version)
            case ServerState.RECRUITING | ServerState.TRAINING:
                return self.run.restore()
            case ServerState.PUBLISHING:
                return self.run.publish()
            case ServerState.WAITING:
                return []
            case _:
                assert_never(self._server.state)
