"""Decides on a run: when it trains, what a lost Flower server means, and how it ends.

    open_run → does the code fit? → recruiting → quorum → training → run_finished → publishing → the end

Pure: every method returns the effects that the agent performs. `recruiting` decides how long a run waits for its
quorum.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, assert_never

from fedbus.agents.common.machine import CancelTimer, Log, Publish, Reply, RequestId, StartTimer
from fedbus.agents.server_manager.code_rollout import CodeRollout
from fedbus.agents.server_manager.effects import (
    CheckFit,
    Effect,
    FindFlowerServer,
    PublishVersion,
    ReadJoined,
    ReadRecruits,
    RecordRound,
    RecordRun,
    ReportFlowerServer,
    RetireVersions,
    StartFlowerServer,
    StopFlowerServer,
)
from fedbus.agents.server_manager.events import (
    CancelRequested,
    FitChecked,
    FlowerServerFound,
    FlowerServerNotStarted,
    RecruitsRead,
    RunMessage,
    RunRequested,
    TimerName,
    VersionPublished,
)
from fedbus.agents.server_manager.model_availability import CloseRun, ModelAvailability, serve
from fedbus.agents.server_manager.records import ServerRecord
from fedbus.agents.server_manager.recruiting import (
    AppNotLoaded,
    ExtendDeadline,
    QuorumMissed,
    ReadClients,
    Recruiting,
    RecruitingDecision,
)
from fedbus.contracts.client import ClientJoined, FailTrain
from fedbus.contracts.flower_server import (
    BeginTraining,
    RoundFinished,
    RunFailed,
    RunFinished,
    ServerLost,
    ServerStarted,
    StartServer,
)
from fedbus.contracts.message import RefusalKind, Refused
from fedbus.contracts.model import Artifact, ModelRef
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import (
    RunCancelled,
    RunOpened,
    ServerChanges,
    ServerClosed,
    ServerEvent,
    ServerState,
    UpdateReady,
)
from fedbus.contracts.situations import ServerRecruiting, ServerRun, ServerTraining, server_publishing
from fedbus.contracts.task.run_config import InvalidOverride, check_overrides
from fedbus.contracts.task.task import Task
from fedbus.domain.code_rollout import TrialResult
from fedbus.domain.run_outcome import no_update_reason, run_outcome
from fedbus.domain.run_recovery import GiveUp, Resume, decide_recovery

PUBLISH_S: Final = 120.0
"""How long the model store may take for the version of a finished run."""
BLOCKED_RETRY_S: Final = 60.0
"""The pause before the candidate is tried again, after a run that failed for a reason outside its code."""


@dataclass(frozen=True)
class _Opening:
    """A run whose code is compared with the champion."""

    id: RequestId
    run: str
    task: Task
    plan: RunPlan
    model: ModelRef
    traceparent: str


@dataclass(frozen=True)
class _Starting:
    """A run whose Flower server is being started."""

    run: str
    id: RequestId | None
    """None if the server was lost and no request waits for the start."""


class TrainingRun:
    """The runs of one task, one at a time."""

    def __init__(self, server: ServerRecord, availability: ModelAvailability, rollout: CodeRollout) -> None:
        self._server = server
        self._availability = availability
        self._rollout = rollout
        self._recruiting = Recruiting()
        self._opening: _Opening | None = None
        self._starting: _Starting | None = None
        self._finding = ""
        """The run whose Flower server is looked for."""
        self.is_restoring = False
        self.is_publishing = False
        self.is_retiring = False

    @property
    def is_opening(self) -> bool:
        return self._opening is not None

    @property
    def is_starting(self) -> bool:
        return self._starting is not None

    @property
    def is_finding(self) -> bool:
        return self._finding != ""

    def invitation(self, now: datetime) -> UpdateReady | None:
        """Return the run that clients may join; during training, a late client may still join."""
        match self._server.situation:
            case ServerRecruiting() as run:
                return _invite(self._server.data.task, run, self._recruiting.deadline or run.recruit_until)
            case ServerTraining() as run:
                return _invite(self._server.data.task, run, now + timedelta(seconds=run.plan.round_s))
            case _:
                return None

    # --- opening a run ------------------------------------------------------------------------------

    def refuses_at_once(self, event: RunRequested) -> bool:
        """Return whether the run is refused without a check, because the model store is unusable."""
        return self._availability.trouble != "" and event.request.run != self._server.data.run

    def on_requested(self, event: RunRequested) -> list[Effect]:
        data, request = self._server.data, event.request
        if self.refuses_at_once(event):
            return [Reply(event.id, Refused(reason=self._availability.trouble))]
        if request.run == data.run and data.recruit_until is not None:  # a repeated request
            return [Reply(event.id, RunOpened(recruit_until=data.recruit_until))]
        if self._server.state is not ServerState.WAITING or data.model is None:
            reason = f"the server of {data.task} is {self._server.state} with {data.run}"
            return [Reply(event.id, Refused(reason=reason))]
        task, plan = self._rollout.task_for_run(request)
        try:
            config = check_overrides(task.run_config, plan.config)
        except InvalidOverride as error:
            refusal = Reply(event.id, Refused(reason=str(error)))
            return [refusal, *self._rollout.on_config_refused(task.code_version, str(error))]
        plan = plan.model_copy(update={"config": config})
        self._opening = _Opening(event.id, request.run, task, plan, data.model, event.traceparent)
        return [CheckFit(task.code_version, data.model)]

    def on_fit_checked(self, event: FitChecked, now: datetime) -> list[Effect]:
        opening, self._opening = self._opening, None
        if opening is None:
            return []
        reason = event.store_error or (event.difference and misfit(opening.model, event.difference))
        if reason:
            return [Reply(opening.id, Refused(reason=reason))]
        return self._recruit(opening, now)

    def _recruit(self, opening: _Opening, now: datetime) -> list[Effect]:
        recruit_until = now + timedelta(seconds=opening.plan.recruit_s)
        self._recruiting = Recruiting(is_starting=True)
        changes = ServerChanges(
            run=opening.run,
            plan=opening.plan,
            code_version=opening.task.code_version,
            base=opening.model,
            candidate=None,
            recruit_until=recruit_until,
            cohort=(),
            round=0,
            trainings=0,
            failures=0,
            last=None,
            checkpoint=None,
            recoveries=0,
            missing=0,
            traceparent=opening.traceparent,
        )
        move = self._server.move(ServerEvent.RUN_REQUESTED, changes, deadline=recruit_until)
        self._starting = _Starting(opening.run, opening.id)
        start = _start_server(
            self._server.data.task,
            opening.run,
            opening.plan,
            opening.task.code_version,
            opening.model,
            first_round=1,
        )
        return [move, start]

    def on_server_starting(self, run: str, now: datetime) -> list[Effect]:
        """Handle the start of a Flower server, whose run may have ended meanwhile."""
        starting, self._starting = self._starting, None
        effects: list[Effect] = []
        if self._current(run) is None:
            effects.append(StopFlowerServer(run))
        recruit_until = self._server.data.recruit_until
        if starting is None or starting.id is None or recruit_until is None:
            return effects
        if self._server.state is ServerState.RECRUITING:
            effects.append(StartTimer(TimerName.RECRUITING, _seconds_until(recruit_until, now)))
        return [*effects, Reply(starting.id, RunOpened(recruit_until=recruit_until))]

    def on_server_not_started(self, event: FlowerServerNotStarted) -> list[Effect]:
        starting, self._starting = self._starting, None
        refusal = event.refusal
        effects: list[Effect] = []
        if self._current(event.run) is not None:
            is_blocked = refusal.kind is not RefusalKind.CALLER
            effects += self._fail(ServerEvent.RUN_FAILED, refusal.reason, is_blocked=is_blocked)
        if starting is not None and starting.id is not None:
            effects.append(Reply(starting.id, refusal))
        return effects

    # --- after a restart ----------------------------------------------------------------------------

    def restore(self) -> list[Effect]:
        """Continue the run that the log names."""
        self._recruiting = Recruiting(self._server.data.cohort)
        self.is_restoring = True
        return [ReadJoined()]

    def restore_joined(self, messages: tuple[ClientJoined, ...], now: datetime) -> list[Effect]:
        """Restore the clients that joined. A lost Flower server is reported after its own messages."""
        self.is_restoring = False
        run = self._server.data.run
        effects = [effect for one in messages if one.run == run for effect in self._on_client_joined(one)]
        match self._server.situation:
            case ServerRecruiting() as recruiting:
                delay_s = _seconds_until(recruiting.recruit_until, now)
                return [
                    *effects,
                    StartTimer(TimerName.RECRUITING, delay_s),
                    ReportFlowerServer(recruiting.run),
                ]
            case ServerTraining() as training:
                return [*effects, ReportFlowerServer(training.run)]
            case _:
                return effects

    def announce_end(self, event: ServerEvent, reason: str) -> list[Effect]:
        """Publish the end of the last run again, which a manager that stopped may not have published.

        Args:
            event: The last event of the server before the restart.
            reason: Its reason.

        """
        announced = self._availability.announce() if event is ServerEvent.VERSION_PUBLISHED else []
        return announced + self._close(event, reason)

    # --- messages of a run --------------------------------------------------------------------------

    def handle(self, message: RunMessage, now: datetime) -> list[Effect]:  # noqa: PLR0911 - one line a message
        """Handle a message of the run; one of another run changes nothing."""
        if message.run != self._server.data.run:
            return []
        situation = self._server.situation
        match message, situation:
            case ServerStarted(), ServerRecruiting():
                return self._begin_recruiting(situation, now)
            case ServerStarted(), ServerTraining():
                changes = ServerChanges(cohort=self._members(situation))
                move = self._server.move(ServerEvent.SERVER_RECOVERED, changes)
                return [move, *self._begin_training()]
            case ClientJoined(), _:
                return self._on_client_joined(message)
            case FailTrain(), ServerRecruiting():
                decision = self._recruiting.on_fail_train(message, situation.plan)
                return self._apply_recruiting(decision, message.run)
            case FailTrain(), _:
                return []
            case RoundFinished(), ServerTraining():
                return self._on_round_finished(message, situation)
            case RunFinished(), ServerTraining():
                return self._on_run_finished(message, situation, now)
            case RunFailed(), ServerRecruiting() | ServerTraining():
                return self._fail(ServerEvent.RUN_FAILED, message.reason)
            case ServerLost(), ServerRecruiting() | ServerTraining():
                self._finding = message.run
                return [FindFlowerServer(message.run, message.reason)]
            case _:
                data = {"message": message.name, "state": str(self._server.state)}
                return [Log("debug", "Ignoring message for a finished run", data)]

    def _begin_recruiting(self, recruiting: ServerRecruiting, now: datetime) -> list[Effect]:
        """Invite the clients. The time to recruit them begins now: the server may have loaded the app for long."""
        plan = recruiting.plan
        invitation = _invite(self._server.data.task, recruiting, self._recruiting.open(plan, now))
        return [StartTimer(TimerName.RECRUITING, plan.recruit_s), Publish(invitation)]

    def _on_client_joined(self, message: ClientJoined) -> list[Effect]:
        if message.code_version != self._server.data.code_version:
            data = {"client": message.client, "code": message.code_version}
            return [Log("warning", "Ignoring a client with another code version", data)]
        self._recruiting.add(message.client)
        match self._server.situation:
            case ServerRecruiting(plan=plan) if self._recruiting.has_quorum(plan):
                changes = ServerChanges(cohort=self._recruiting.joined)
                move = self._server.move(ServerEvent.QUORUM_REACHED, changes)
                return [CancelTimer(TimerName.RECRUITING), move, *self._begin_training()]
            case _:
                return []

    def _begin_training(self) -> list[Effect]:
        match self._server.situation:
            case ServerTraining(run=run, cohort=cohort):
                return [Publish(BeginTraining(task=self._server.data.task, run=run, cohort=cohort))]
            case _:
                return []

    def _on_round_finished(self, message: RoundFinished, training: ServerTraining) -> list[Effect]:
        failed = len(message.result.failures)
        changes = ServerChanges(
            round=message.round,
            trainings=training.trainings + len(message.result.participants) + failed,
            failures=training.failures + failed,
            last=message.result,
            checkpoint=message.checkpoint or training.checkpoint,
            cohort=self._members(training),
        )
        return [self._server.move(ServerEvent.ROUND_FINISHED, changes), RecordRound(message.result)]

    def _members(self, training: ServerTraining) -> tuple[str, ...]:
        """Return the cohort, and the clients that have joined since."""
        return tuple(dict.fromkeys((*training.cohort, *self._recruiting.joined)))

    # --- deadlines and losses -----------------------------------------------------------------------

    def on_recruiting_deadline(self) -> list[Effect]:
        match self._server.situation:
            case ServerRecruiting(run=run, plan=plan):
                return self._apply_recruiting(self._recruiting.on_deadline(plan), run)
            case _:
                return []

    def on_recruits_read(self, event: RecruitsRead) -> list[Effect]:
        match self._server.situation:
            case ServerRecruiting(run=run, plan=plan):
                return self._apply_recruiting(self._recruiting.on_recruits_read(event, plan), run)
            case _:
                return []

    def _apply_recruiting(self, decision: RecruitingDecision | None, run: str) -> list[Effect]:
        """Return the effects of a decision of the recruiting of *run*."""
        match decision:
            case None:
                return []
            case ExtendDeadline(delay_s=delay_s):
                return [StartTimer(TimerName.RECRUITING, delay_s)]
            case ReadClients():
                return [ReadRecruits(run)]
            case AppNotLoaded(reason=reason):
                return [StopFlowerServer(run), *self._fail(ServerEvent.RUN_FAILED, reason)]
            case QuorumMissed(reason=reason, missing=missing):
                changes = ServerChanges(missing=missing)
                failed = self._fail(ServerEvent.RECRUITING_EXPIRED, reason, changes)
                return [StopFlowerServer(run), *failed]
            case _:
                assert_never(decision)

    def on_server_found(self, event: FlowerServerFound) -> list[Effect]:
        """Handle the reported loss of a Flower server, which may have been started again since."""
        self._finding = ""
        if event.is_up:
            return []
        match self._current(event.run):
            case ServerTraining() as training:
                return self._recover(training, event.reason)
            case ServerRecruiting():
                reason = f"{event.reason}, while the server was recruiting"
                return self._fail(ServerEvent.RUN_FAILED, reason)
            case _:
                return []

    def _recover(self, training: ServerTraining, reason: str) -> list[Effect]:
        """Start another Flower server at the last stored round, or fail the run."""
        match decide_recovery(training, reason):
            case GiveUp(reason=why):
                return self._fail(ServerEvent.RUN_FAILED, why)
            case Resume(artifact=artifact, first_round=first_round):
                changes = ServerChanges(recoveries=training.recoveries + 1)
                move = self._server.move(ServerEvent.SERVER_LOST, changes, reason=reason)
                self._starting = _Starting(training.run, None)
                start = _start_server(
                    self._server.data.task,
                    training.run,
                    training.plan,
                    training.code_version,
                    artifact,
                    first_round=first_round,
                )
                return [move, start]

    def _current(self, run: str) -> ServerRecruiting | ServerTraining | None:
        """Return the situation of *run*, while clients may join it."""
        match self._server.situation:
            case ServerRecruiting() | ServerTraining() as situation if situation.run == run:
                return situation
            case _:
                return None

    # --- the end ------------------------------------------------------------------------------------

    def cancel(self, event: CancelRequested) -> list[Effect]:
        run = event.request.run
        if self._current(run) is None:
            reason = f"{run} is not in progress: the server is {self._server.state}"
            return [Reply(event.id, Refused(reason=reason))]
        return [
            StopFlowerServer(run),
            *self._end(ServerEvent.RUN_CANCELLED, event.request.reason),
            *self._rollout.resume(),
            Reply(event.id, RunCancelled()),
        ]

    def _on_run_finished(self, message: RunFinished, training: ServerTraining, now: datetime) -> list[Effect]:
        if reason := no_update_reason(training):
            return self._fail(ServerEvent.RUN_FAILED, reason)
        changes = ServerChanges(checkpoint=message.artifact, round=message.rounds)
        deadline = now + timedelta(seconds=PUBLISH_S)
        move = self._server.move(ServerEvent.RUN_FINISHED, changes, deadline=deadline)
        return [move, *self.publish()]

    def publish(self) -> list[Effect]:
        """Publish the result as a version, and promote it if the task's gate allows it."""
        run = server_publishing(self._server.data)
        self.is_publishing = True
        return [PublishVersion(run, self._rollout.task_at(run.code_version))]

    def on_published(self, event: VersionPublished) -> list[Effect]:
        """Handle the new version, which the gate promoted or rejected."""
        self.is_publishing = False
        manifest, verdict = event.manifest, event.verdict
        if event.served is not None:
            changes = serve(event.served, ServerChanges(candidate=manifest.ref))
            move = self._server.move(ServerEvent.VERSION_PUBLISHED, changes, reason=verdict.reason)
            return [move, *self._availability.offer(CloseRun(event.keep))]
        reason = f"version {manifest.version} is not promoted: {verdict.reason}"
        changes = ServerChanges(candidate=manifest.ref)
        return [
            *self._end(ServerEvent.CANDIDATE_KEPT, reason, changes),
            self._retire(event.keep),
            *self._judge(
                kept_back=verdict.reason if verdict.was_compared else "", is_unjudged=not verdict.was_compared
            ),
        ]

    def on_offer_result(self, then: CloseRun) -> list[Effect]:
        """Announce the new champion, which clients may fetch now, and the end of the run."""
        return [
            *self._availability.announce(),
            *self._close(ServerEvent.VERSION_PUBLISHED, ""),
            self._retire(then.keep),
            *self._judge(),
        ]

    def on_retired(self) -> list[Effect]:
        self.is_retiring = False
        return []

    def _retire(self, keep: int) -> RetireVersions:
        """Delete old versions. No run starts and no version is promoted until then: both need versions."""
        data = self._server.data
        self.is_retiring = True
        spare = {one.sha256 for one in (data.model, data.base, data.checkpoint) if one is not None}
        return RetireVersions(keep, frozenset(spare))

    def on_publish_failed(self, reason: str) -> list[Effect]:
        """Handle a version that the model store did not accept."""
        self.is_publishing = False
        return self._fail(ServerEvent.VERSION_REFUSED, reason, is_blocked=True)

    def _fail(
        self,
        event: ServerEvent,
        reason: str,
        changes: ServerChanges | None = None,
        *,
        is_blocked: bool = False,
    ) -> list[Effect]:
        """End a run without a version.

        Args:
            event: What ended it.
            reason: Why.
            changes: The data that *event* changes.
            is_blocked: True if the cause is a store or a missing agent, not the code.

        """
        effects = self._end(event, reason, changes)
        if is_blocked:
            return effects + self._rollout.resume(pause_s=BLOCKED_RETRY_S)
        return effects + self._judge(failed=reason)

    def _end(self, event: ServerEvent, reason: str, changes: ServerChanges | None = None) -> list[Effect]:
        move = self._server.move(event, changes, reason=reason)
        return [CancelTimer(TimerName.RECRUITING), move, *self._close(event, reason)]

    def _close(self, event: ServerEvent, reason: str) -> list[Effect]:
        """Publish the end of the run, so that its trainers end; no effect if *event* does not end a run."""
        data = self._server.data
        outcome = run_outcome(event)
        if data.run is None or outcome is None:
            return []
        message = ServerClosed(
            task=data.task,
            run=data.run,
            outcome=outcome,
            rounds=data.round,
            reason=reason,
            new_model=event is not ServerEvent.CANDIDATE_KEPT,
        )
        return [Publish(message), RecordRun(outcome)]

    def _judge(self, *, failed: str = "", kept_back: str = "", is_unjudged: bool = False) -> list[Effect]:
        """Judge the candidate code by the run, and start what waits for its end."""
        data = self._server.data
        trial = TrialResult(failed, data.trainings, data.failures, kept_back, is_unjudged)
        return self._rollout.on_run_end(data.code_version, trial)


def misfit(model: ModelRef, difference: str) -> str:
    """Explain why no run can begin with *model*."""
    return (
        f"the champion, version {model.version}, does not fit the task's code: {difference}. Deploy code that fits, "
        "or start a new lineage with this code: fedbus model init --new-lineage"
    )


def _invite(task: str, run: ServerRun, recruit_until: datetime) -> UpdateReady:
    return UpdateReady(
        task=task,
        run=run.run,
        plan=run.plan,
        recruit_until=recruit_until,
        code_version=run.code_version,
        model=run.model,
        traceparent=run.traceparent,
    )


def _start_server(
    task: str, run: str, plan: RunPlan, code_version: str, artifact: Artifact, *, first_round: int
) -> StartFlowerServer:
    return StartFlowerServer(
        StartServer(
            task=task,
            run=run,
            plan=plan,
            artifact=Artifact.model_validate(artifact.model_dump()),
            first_round=first_round,
            code_version=code_version,
        )
    )


def _seconds_until(moment: datetime, now: datetime) -> float:
    return max(0.0, (moment - now).total_seconds())
