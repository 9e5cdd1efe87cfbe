"""Decides how a code version is rolled out: a cohort tries it and a run judges it, then all clients get it or none.

    proposed → code_found → the cohort is ready → a run → judged → the next stage …
        → rollout_finished, or → rollout_reverted

Pure: every method returns the effects that the agent performs. `code_watcher` finds and checks versions before
they are proposed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from fedbus.agents.common.machine import CancelTimer, Log, Publish, RetryLater, StartTimer
from fedbus.agents.server_manager.effects import (
    BuildLineage,
    CancelCandidateRunRequest,
    Effect,
    PruneCode,
    ReadFleet,
    RequestCandidateRun,
)
from fedbus.agents.server_manager.events import (
    CodeMessage,
    CodeUnusable,
    ManagerStarted,
    ProposedVersion,
    TimerName,
)
from fedbus.agents.server_manager.records import CodeRecord
from fedbus.contracts.code import (
    CodeChanges,
    CodeData,
    CodeEvent,
    CodePublished,
    CodeReady,
    CodeRefused,
    CodeState,
)
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import OpenRun
from fedbus.contracts.task.task import Task
from fedbus.domain.code_rollout import (
    TrialResult,
    cohort_members,
    describe_stage,
    describe_unanswered_stage,
    have_all_answered,
    rejection_reason,
    revert_reason,
    stage_cohort,
)
from fedbus.domain.run_participation import short_version

VERSIONS_REMEMBERED: Final = 20
CHECKOUTS_KEPT: Final = 3
AFTER_THE_RUN: Final = "the rollout starts when the current run has ended"
REASON_CHARS: Final = 500
"""The longest reason for which a version is rejected."""


@dataclass(frozen=True)
class _Begin:
    """The first stage of *proposal* waits for the labels of the clients."""

    proposal: ProposedVersion


@dataclass(frozen=True)
class _Continue:
    """The next stage of *rollout* waits for the labels of the clients."""

    rollout: "_Rollout"


_StageStart: TypeAlias = _Begin | _Continue


@dataclass
class _Rollout:
    """The current rollout."""

    task: Task
    """The candidate."""
    ready: dict[str, None] = field(default_factory=dict)
    """The clients that are ready with it, in order of their answers."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reasons by client."""


class CodeRollout:
    """The code versions of one task.

    Args:
        first: The version that the server was started with.
        record: The code lifecycle.

    """

    def __init__(self, first: Task, record: CodeRecord) -> None:
        self._record = record
        self._deployed = first
        self._rollout: _Rollout | None = None
        self._proposal: ProposedVersion | None = None
        self._attempt = 0
        """How often the scheduler refused a run of the candidate."""
        self._is_run_requested = False
        """True while a request for a run of the candidate has no answer."""
        self._stage_start: _StageStart | None = None

    # --- state --------------------------------------------------------------------------------------

    @property
    def data(self) -> CodeData:
        return self._record.data

    @property
    def deployed_task(self) -> Task:
        """The task at the version of all clients outside the cohort of a rollout."""
        return self._deployed

    @property
    def is_rolling(self) -> bool:
        return self._rollout is not None

    @property
    def is_reading_fleet(self) -> bool:
        """True while a stage waits for the labels of the clients."""
        return self._stage_start is not None

    @property
    def builds_lineage(self) -> bool:
        """True if the first model of a new lineage tries the candidate, instead of a run."""
        return self.is_rolling and self.data.new_lineage

    @property
    def versions_in_use(self) -> tuple[str, ...]:
        """The versions whose files must be kept."""
        proposed = (self._proposal.task.code_version,) if self._proposal else ()
        return (
            self.data.code_version,
            self.data.candidate,
            *proposed,
            *self.data.previous[:CHECKOUTS_KEPT],
        )

    def is_known(self, version: str) -> bool:
        """Return whether *version* is deployed, rolled out, proposed or rejected."""
        proposed = self._proposal.task.code_version if self._proposal else ""
        return version in (self.data.code_version, self.data.candidate, proposed, *self.data.rejected)

    def outcome_of(self, proposal: ProposedVersion) -> str:
        """Describe the outcome of *proposal* for a user."""
        return AFTER_THE_RUN if proposal is self._proposal else describe_stage(self.data)

    def waits_for_run_end(self, version: str) -> bool:
        """Return whether the rollout of *version* starts after the current run."""
        return self._proposal is not None and self._proposal.task.code_version == version

    def task_for_run(self, request: OpenRun) -> tuple[Task, RunPlan]:
        """Return the task that a run trains now, and its plan; the quorum is at most the size of the cohort."""
        rollout = self._rollout
        if rollout is None or not rollout.ready or self.data.new_lineage:
            return self._deployed, _plan(request, self._deployed)
        plan = _plan(request, rollout.task)
        return rollout.task, plan.model_copy(update={"quorum": min(plan.quorum, len(rollout.ready))})

    def task_at(self, version: str) -> Task | None:
        """Return the task at *version*; None if it is neither deployed nor the candidate."""
        if self._rollout is not None and self._rollout.task.code_version == version:
            return self._rollout.task
        return self._deployed if self._deployed.code_version == version else None

    # --- the start ----------------------------------------------------------------------------------

    def restore(self, started: ManagerStarted) -> list[Effect]:
        """Continue from the log. If the code in the log cannot be loaded, deploy the version of the start."""
        effects: list[Effect] = []
        match started.deployed:
            case Task() as task:
                self._deployed = task
            case CodeUnusable(reason=reason):
                effects += self._deploy_own(reason)
        if self._record.state is CodeState.STEADY:
            return effects
        match started.candidate:
            case Task() as task:
                self._rollout = rollout = _Rollout(task)
                return effects + self._restore_rollout(rollout, started.answers)
            case CodeUnusable(reason=reason):
                return effects + self._revert(reason)
            case None:
                return effects + self._revert("the candidate was not loaded")

    def _deploy_own(self, error: str) -> list[Effect]:
        reason = f"{short_version(self.data.code_version)} is no longer available: {error}"
        effects: list[Effect] = []
        if self._record.state is CodeState.ROLLING:
            changes = CodeChanges(candidate="", clients=(), ready=())
            effects.append(self._record.move(CodeEvent.ROLLOUT_REVERTED, changes, reason=reason))
        changes = CodeChanges(code_version=self._deployed.code_version)
        return [*effects, self._record.move(CodeEvent.CODE_READ, changes, reason=reason)]

    def _restore_rollout(self, rollout: _Rollout, answers: Sequence[CodeMessage]) -> list[Effect]:
        for answer in answers:
            self._note(rollout, answer)
        timer = _stage_timer(rollout)
        return [timer, *self._try_candidate(rollout)] if self.data.ready else [timer]

    # --- versions -----------------------------------------------------------------------------------

    def propose(self, proposal: ProposedVersion, *, is_idle: bool) -> list[Effect]:
        """Roll *proposal* out as soon as no run is active."""
        self._proposal = proposal
        return self.resume() if is_idle else []

    def reject(self, version: str, reason: str, *, is_unsigned: bool) -> list[Effect]:
        """Reject *version*. The same reason is published once."""
        rejected = self._with_rejected(version, reason)
        if rejected[version] == self.data.rejected.get(version):
            return []
        others = tuple(one for one in self.data.not_signed if one in rejected and one != version)
        changes = CodeChanges(rejected=rejected, not_signed=(*others, version) if is_unsigned else others)
        move = self._record.move(
            CodeEvent.CODE_REJECTED, changes, reason=f"{short_version(version)}: {reason}"
        )
        return [Log("warning", "Code version rejected", {"code": version, "reason": reason}), move]

    def pause_following(self, reason: str) -> list[Effect]:
        """Record that the code cannot be followed now. The same reason is published once."""
        if reason == self.data.held_up:
            return []
        changes = CodeChanges(held_up=reason[:1000])
        move = self._record.move(CodeEvent.FOLLOWING_HELD_UP, changes, reason=reason)
        return [Log("warning", "Code following paused", {"reason": reason}), move]

    def resume_following(self) -> list[Effect]:
        """Record that the code can be followed again."""
        if not self.data.held_up:
            return []
        return [self._record.move(CodeEvent.FOLLOWING_RESUMED, CodeChanges(held_up=""))]

    def revert(self, reason: str) -> list[Effect]:
        """Return every client to the deployed version; no effects if there is no rollout."""
        return self._revert(reason) if self.is_rolling else []

    def _with_rejected(self, version: str, reason: str) -> dict[str, str]:
        return _newest({**_without(version, self.data.rejected), version: reason[:REASON_CHARS]})

    # --- stages -------------------------------------------------------------------------------------

    def resume(self, *, pause_s: float = 0.0) -> list[Effect]:
        """Start the proposed rollout, or try the candidate. No run is active.

        Args:
            pause_s: The pause before the candidate is tried.

        """
        if self._stage_start is not None:
            return []
        if self._proposal is not None:
            self._stage_start, self._proposal = _Begin(self._proposal), None
            return [ReadFleet()]
        if self._rollout is None or not self.data.ready:
            return []
        return self._try_candidate(self._rollout, pause_s)

    def start_stage(self, fleet: Mapping[str, Mapping[str, str]]) -> list[Effect]:
        """Start the stage that waits for the labels of the clients."""
        start, self._stage_start = self._stage_start, None
        match start:
            case _Begin(proposal):
                return self._begin(proposal, fleet)
            case _Continue(rollout):
                return self._begin_next_stage(rollout, fleet) + self.resume()
            case None:
                return []

    def _begin(self, proposal: ProposedVersion, fleet: Mapping[str, Mapping[str, str]]) -> list[Effect]:
        version = proposal.task.code_version
        self._rollout = rollout = _Rollout(proposal.task)
        rejected = self._rejected_when_begun(proposal)
        changes = CodeChanges(
            candidate=version,
            attempt=self.data.attempt + 1,
            stages=proposal.stages,
            new_lineage=proposal.new_lineage,
            rejected=rejected,
            not_signed=tuple(one for one in self.data.not_signed if one in rejected),
            **_stage(0, proposal.stages, version, fleet),
        )
        reason = f"{short_version(version)}, stage by stage: {', '.join(proposal.stages)}"
        return [self._record.move(CodeEvent.CODE_FOUND, changes, reason=reason), *self._ask_cohort(rollout)]

    def _rejected_when_begun(self, proposal: ProposedVersion) -> dict[str, str]:
        """Return the rejected versions: without *proposal*, and with the versions that it replaces."""
        abandoned = (self.data.code_version, self.data.candidate) if proposal.revert_reason else ()
        reasons = dict.fromkeys(filter(None, abandoned), proposal.revert_reason[:REASON_CHARS])
        return _newest(_without(proposal.task.code_version, {**self.data.rejected, **reasons}))

    def _begin_next_stage(self, rollout: _Rollout, fleet: Mapping[str, Mapping[str, str]]) -> list[Effect]:
        passed = self.data.stages[self.data.stage]
        changes = _stage(self.data.stage + 1, self.data.stages, self.data.candidate, fleet)
        move = self._record.move(CodeEvent.STAGE_PASSED, changes, reason=f"{passed} passed")
        return [move, *self._ask_cohort(rollout)]

    def _ask_cohort(self, rollout: _Rollout) -> list[Effect]:
        """Clients that were ready in the stage before are ready."""
        return [*self.announce(), _stage_timer(rollout), *self._evaluate_answers(rollout)]

    def announce(self) -> list[Effect]:
        """Publish to every client which code it should have."""
        plan = self.data.plan.model_dump(include=set(type(self.data.plan).model_fields))
        return [Publish(CodePublished(task=self._deployed.id, **plan))]

    # --- answers of clients -------------------------------------------------------------------------

    def answer(self, message: CodeMessage) -> list[Effect]:
        """Record the answer of a client: the candidate is ready, or refused."""
        if self._rollout is None:
            return []
        self._note(self._rollout, message)
        return self._evaluate_answers(self._rollout)

    def _note(self, rollout: _Rollout, message: CodeMessage) -> None:
        if not self._is_of_this_rollout(message):
            return
        match message:
            case CodeReady():
                rollout.ready[message.client] = None
                rollout.refused.pop(message.client, None)
            case CodeRefused():
                rollout.refused[message.client] = message.reason
                rollout.ready.pop(message.client, None)

    def _is_of_this_rollout(self, message: CodeMessage) -> bool:
        """Return whether *message* answers this rollout. An older device does not name the attempt."""
        return message.code_version == self.data.candidate and message.attempt in (None, self.data.attempt)

    def _evaluate_answers(self, rollout: _Rollout) -> list[Effect]:
        """Revert if too many clients refuse; continue if every client of the stage has answered."""
        reason = rejection_reason(rollout.task.table.rollout, self.data, rollout.refused)
        if reason is not None:
            return self._revert(reason)
        if self.data.ready or not have_all_answered(
            self.data, frozenset(rollout.ready), frozenset(rollout.refused)
        ):
            return []
        return self._finish_stage_wait(rollout, "")

    def on_stage_deadline(self) -> list[Effect]:
        """Continue with the clients that have answered in time; if none has, continue to wait."""
        rollout = self._rollout
        if rollout is None or self.data.ready:
            return []
        if rollout.ready:
            silent = sorted(set(self.data.clients) - set(rollout.ready) - set(rollout.refused))
            return self._finish_stage_wait(rollout, f"without {', '.join(silent[:10]) or 'other clients'}")
        effects: list[Effect] = []
        if (
            self._record.event is not CodeEvent.STAGE_UNANSWERED
        ):  # published once; a later answer still counts
            effects.append(
                self._record.move(CodeEvent.STAGE_UNANSWERED, reason=describe_unanswered_stage(self.data))
            )
        return [*effects, _stage_timer(rollout)]

    def _finish_stage_wait(self, rollout: _Rollout, reason: str) -> list[Effect]:
        changes = CodeChanges(ready=tuple(sorted(rollout.ready)), refused=dict(rollout.refused))
        move = self._record.move(CodeEvent.STAGE_READY, changes, reason=reason)
        return [CancelTimer(TimerName.STAGE), move, *self._try_candidate(rollout)]

    # --- the trial ----------------------------------------------------------------------------------

    def _try_candidate(self, rollout: _Rollout, pause_s: float = 0.0) -> list[Effect]:
        """Start a trial run of the candidate, or build its first model. The cohort has the candidate."""
        if self.data.new_lineage or rollout.task.table.schedule.on_new_code:
            self._is_run_requested = False
            return [CancelCandidateRunRequest(), StartTimer(TimerName.CANDIDATE, pause_s)]
        return []

    def on_candidate_due(self, *, is_idle: bool) -> list[Effect]:
        """Try the candidate now. A first model waits for the end of a run; see `resume`."""
        if self._rollout is None:
            return []
        if not self.data.new_lineage:
            self._is_run_requested = True
            return [RequestCandidateRun()]
        return [BuildLineage(self.data.candidate)] if is_idle else []

    def on_candidate_run_answered(self, refusal: str, *, is_idle: bool) -> list[Effect]:
        """Handle the answer of the scheduler. During another run, wait for the end of that run."""
        self._is_run_requested = False
        if not refusal:
            self._attempt = 0
            return []
        log = Log("info", "The run of the candidate waits", {"reason": refusal})
        if not is_idle:
            return [log]
        self._attempt += 1
        return [log, RetryLater(TimerName.CANDIDATE, self._attempt)]

    def on_config_refused(self, version: str, reason: str) -> list[Effect]:
        """Revert the candidate if its trial run cannot have the run configuration that the server's options set."""
        if self._rollout is None or not self._is_run_requested or version != self.data.candidate:
            return []
        return self._revert(f"its trial run is refused: {reason}")

    def on_run_end(self, version: str, trial: TrialResult) -> list[Effect]:
        """Judge the candidate by a run of *version*, then start the work that waits for the end of the run."""
        rollout = self._rollout
        if rollout is None or version != self.data.candidate:
            return self.resume()
        return self._judge(rollout, trial) + self.resume()

    def _judge(self, rollout: _Rollout, trial: TrialResult) -> list[Effect]:
        reason = revert_reason(rollout.task.table.rollout, trial)
        if reason is not None:
            return self._revert(reason)
        if trial.is_unjudged:
            data = {"code": self.data.candidate}
            return [Log("info", "Candidate run was not evaluated; starting another trial run", data)]
        if self.data.stage + 1 < len(self.data.stages):
            self._stage_start = _Continue(rollout)
            return [ReadFleet()]
        return self.finish()

    # --- the end ------------------------------------------------------------------------------------

    def finish(self) -> list[Effect]:
        """Make the candidate the version of all clients."""
        if self._rollout is None:
            return []
        previous = tuple(dict.fromkeys((self.data.code_version, *self.data.previous)))[:VERSIONS_REMEMBERED]
        self._deployed, self._rollout = self._rollout.task, None
        changes = CodeChanges(code_version=self._deployed.code_version, previous=previous)
        return self._end(CodeEvent.ROLLOUT_FINISHED, "", changes)

    def _revert(self, reason: str) -> list[Effect]:
        """Revert the candidate. It is not tried again automatically."""
        version, self._rollout = self.data.candidate, None
        log = Log("warning", "Rollout reverted", {"code": version, "reason": reason})
        rejected = CodeChanges(rejected=self._with_rejected(version, reason))
        return [log, *self._end(CodeEvent.ROLLOUT_REVERTED, reason, rejected)]

    def _end(self, event: CodeEvent, reason: str, changes: CodeChanges) -> list[Effect]:
        version = short_version(self.data.candidate)
        self._is_run_requested = False
        changes = {
            **changes,
            "candidate": "",
            "stages": (),
            "stage": 0,
            "clients": (),
            "ready": (),
            "refused": {},
            "new_lineage": False,
        }
        return [
            CancelTimer(TimerName.STAGE),
            CancelTimer(TimerName.CANDIDATE),
            CancelCandidateRunRequest(),
            self._record.move(event, changes, reason=f"{version}: {reason}" if reason else version),
            *self.announce(),
            PruneCode(),
        ]


def _stage_timer(rollout: _Rollout) -> StartTimer[TimerName]:
    return StartTimer(TimerName.STAGE, rollout.task.table.rollout.wait_s)


def _stage(
    number: int, stages: Sequence[str], version: str, fleet: Mapping[str, Mapping[str, str]]
) -> CodeChanges:
    """Return the data of a stage that begins: its cohort, and no answers."""
    cohort = stage_cohort(stages[number], fleet, version)
    return CodeChanges(
        stage=number, cohort=cohort, clients=cohort_members(cohort, fleet, version), ready=(), refused={}
    )


def _plan(request: OpenRun, task: Task) -> RunPlan:
    return request.plan if request.overrides is None else task.plan_run(request.overrides)


def _without(version: str, rejected: Mapping[str, str]) -> dict[str, str]:
    return {one: why for one, why in rejected.items() if one != version}


def _newest(rejected: Mapping[str, str]) -> dict[str, str]:
    return dict(list(rejected.items())[-VERSIONS_REMEMBERED:])
