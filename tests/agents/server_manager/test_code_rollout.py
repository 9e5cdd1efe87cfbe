"""How a code version is rolled out: events in, the whole list of effects compared."""

import pytest
from support.server_machine import (
    NAME,
    NEW,
    OLD,
    PLAN,
    RUN,
    TRAINED,
    ServerDriver,
    artifact,
    champion,
    make_machine,
    manifest,
    model,
    model_offered,
    running_machine,
    store_is_usable,
    task_at,
)

from fedbus.agents.common.machine import (
    CancelTimer,
    Log,
    Publish,
    Reply,
    RequestId,
    RetryLater,
    StartTimer,
    TimerFired,
)
from fedbus.agents.server_manager import training_run
from fedbus.agents.server_manager.effects import (
    BuildLineage,
    CancelCandidateRunRequest,
    CheckFit,
    Effect,
    MoveCode,
    MoveServer,
    OfferModel,
    PruneCode,
    ReadFleet,
    RequestCandidateRun,
)
from fedbus.agents.server_manager.events import (
    CandidateRunAnswered,
    CodeProposed,
    CodeRejectedByCheck,
    CodeUnusable,
    FleetRead,
    FollowingPaused,
    FollowingResumed,
    LineageBuilt,
    LineageFailed,
    ManagerStarted,
    ProposedVersion,
    PublishFailed,
    RevertRequested,
    RunRequested,
    TimerName,
    VersionPublished,
)
from fedbus.contracts.code import (
    CodeData,
    CodeEvent,
    CodePublished,
    CodeReady,
    CodeRefused,
    RolloutBegun,
    RolloutCohort,
)
from fedbus.contracts.flower_server import RunFailed
from fedbus.contracts.message import Refused
from fedbus.contracts.run import RunOverrides
from fedbus.contracts.server import OpenRun, ServerEvent, ServerState
from fedbus.contracts.task.task import Task
from fedbus.domain.model_promotion import PromotionVerdict

ID = RequestId(7)
FLEET = FleetRead({"c1": {}, "c2": {}})
NEXT = "c" * 40


def ready(client: str, version: str = NEW, attempt: int | None = None) -> CodeReady:
    return CodeReady(task=NAME, client=client, code_version=version, attempt=attempt)


def refuses(client: str, reason: str, attempt: int | None = None) -> CodeRefused:
    return CodeRefused(task=NAME, client=client, code_version=NEW, reason=reason, attempt=attempt)


def proposal(version: str = NEW, *stages: str, new_lineage: bool = False) -> CodeProposed:
    return CodeProposed(ProposedVersion(task_at(version), stages or ("100%",), new_lineage))


def announced(candidate: str = NEW, **more: object) -> Publish:
    content = {"task": NAME, "code_version": OLD, "candidate": candidate, "attempt": 1, **more}
    return Publish(CodePublished.model_validate(content))


def rolling(*stages: str, own: Task | None = None, new_lineage: bool = False) -> ServerDriver:
    """A rollout of NEW in its first stage, with c1 and c2."""
    driver = ServerDriver(running_machine(ServerState.WAITING))
    proposed = ProposedVersion(own or task_at(NEW), stages or ("100%",), new_lineage)
    driver.handle(CodeProposed(proposed), FLEET)
    driver.effects.clear()
    return driver


def in_training_of_the_candidate() -> ServerDriver:
    """The same, whose cohort is ready and whose candidate a run trains."""
    driver = rolling()
    driver.handle(ready("c1"), ready("c2"))
    record = driver.machine._server
    record.state = ServerState.TRAINING
    record.data = record.data.model_copy(update={**TRAINED, "code_version": NEW})
    driver.effects.clear()
    return driver


TRY: list[Effect] = [CancelCandidateRunRequest(), StartTimer(TimerName.CANDIDATE, 0.0)]
ENDS: list[Effect] = [
    CancelTimer(TimerName.STAGE),
    CancelTimer(TimerName.CANDIDATE),
    CancelCandidateRunRequest(),
]
NO_ROLLOUT = {
    "candidate": "",
    "stages": (),
    "stage": 0,
    "clients": (),
    "ready": (),
    "refused": {},
    "new_lineage": False,
}


def reverted(reason: str) -> list[Effect]:
    return [
        Log("warning", "Rollout reverted", {"code": NEW, "reason": reason}),
        *ENDS,
        MoveCode(
            CodeEvent.ROLLOUT_REVERTED,
            {"rejected": {NEW: reason}, **NO_ROLLOUT},  # type: ignore[typeddict-item]  # NO_ROLLOUT is a plain dict
            f"{NEW[:12]}: {reason}",
        ),
        announced(""),
        PruneCode(),
    ]


# --- a proposal ---------------------------------------------------------------------------------------


def test_a_proposal_begins_when_no_run_is_active() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    assert driver.handle(proposal()) == [ReadFleet()]
    assert driver.handle(FLEET) == [
        MoveCode(
            CodeEvent.CODE_FOUND,
            {
                "candidate": NEW,
                "attempt": 1,
                "stages": ("100%",),
                "new_lineage": False,
                "rejected": {},
                "not_signed": (),
                "stage": 0,
                "cohort": RolloutCohort(),
                "clients": ("c1", "c2"),
                "ready": (),
                "refused": {},
            },
            f"{NEW[:12]}, stage by stage: 100%",
        ),
        announced(),
        StartTimer(TimerName.STAGE, 300.0),
    ]


def test_a_proposal_during_a_run_begins_at_its_end() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    event = proposal()
    assert driver.handle(event) == []
    assert driver.machine.rollout.outcome_of(event.proposal) == (
        "the rollout starts when the current run has ended"
    )
    effects = driver.handle(RunFailed(task=NAME, run=RUN, reason="it raised"))
    assert effects[-1] == ReadFleet()
    driver.handle(FLEET)
    assert driver.machine.rollout.data.candidate == NEW
    assert "is being rolled out to 100%" in driver.machine.rollout.outcome_of(event.proposal)


def test_a_version_is_rejected_once_for_each_reason() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    rejected = CodeRejectedByCheck(NEW, "it is not signed", is_unsigned=True)
    assert driver.handle(rejected) == [
        Log("warning", "Code version rejected", {"code": NEW, "reason": "it is not signed"}),
        MoveCode(
            CodeEvent.CODE_REJECTED,
            {"rejected": {NEW: "it is not signed"}, "not_signed": (NEW,)},
            f"{NEW[:12]}: it is not signed",
        ),
    ]
    assert driver.handle(rejected) == []
    assert driver.machine.rollout.is_known(NEW)


def test_a_pause_of_following_is_published_once() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    assert driver.handle(FollowingResumed()) == []
    paused = FollowingPaused("the repository does not answer")
    assert driver.handle(paused)[1:] == [
        MoveCode(
            CodeEvent.FOLLOWING_HELD_UP,
            {"held_up": "the repository does not answer"},
            "the repository does not answer",
        )
    ]
    assert driver.handle(paused) == []
    assert driver.handle(FollowingResumed()) == [MoveCode(CodeEvent.FOLLOWING_RESUMED, {"held_up": ""})]


# --- a stage ------------------------------------------------------------------------------------------


def test_a_run_tries_the_candidate_when_the_stage_is_ready() -> None:
    driver = rolling()
    assert driver.handle(ready("c1")) == []
    assert driver.handle(ready("c2")) == [
        CancelTimer(TimerName.STAGE),
        MoveCode(CodeEvent.STAGE_READY, {"ready": ("c1", "c2"), "refused": {}}),
        *TRY,
    ]
    assert driver.handle(TimerFired(TimerName.CANDIDATE)) == [RequestCandidateRun()]
    assert driver.handle(CandidateRunAnswered("a run is in progress")) == [
        Log("info", "The run of the candidate waits", {"reason": "a run is in progress"}),
        RetryLater(TimerName.CANDIDATE, 1),
    ]
    assert driver.handle(CandidateRunAnswered()) == []


def test_a_task_may_leave_the_trial_to_the_schedule() -> None:
    driver = rolling(own=task_at(NEW, schedule={"on-new-code": False}))
    driver.handle(ready("c1"))
    assert driver.handle(ready("c2"))[-1] == MoveCode(
        CodeEvent.STAGE_READY, {"ready": ("c1", "c2"), "refused": {}}
    )


def test_an_answer_about_another_rollout_does_not_count() -> None:
    driver = rolling()
    driver.handle(ready("c1", OLD), ready("c2", attempt=9), refuses("c1", "no", attempt=9))
    assert driver.handle(ready("c1", attempt=1)) == []
    assert driver.code_events == []


def test_too_many_refusals_revert_the_rollout_before_any_run() -> None:
    reason = "1 of 2 clients refused it (limit 25 %); c1: it needs scikit-learn"
    assert rolling().handle(refuses("c1", "it needs scikit-learn")) == reverted(reason)


def test_a_stage_continues_without_the_clients_that_do_not_answer() -> None:
    driver = rolling()
    driver.handle(ready("c1"))
    assert driver.handle(TimerFired(TimerName.STAGE)) == [
        CancelTimer(TimerName.STAGE),
        MoveCode(CodeEvent.STAGE_READY, {"ready": ("c1",), "refused": {}}, "without c2"),
        *TRY,
    ]
    assert driver.handle(TimerFired(TimerName.STAGE)) == []


def test_an_unanswered_stage_is_published_once_and_keeps_waiting() -> None:
    driver = rolling()
    timer = StartTimer(TimerName.STAGE, 300.0)
    move, again = driver.handle(TimerFired(TimerName.STAGE))
    assert isinstance(move, MoveCode)
    assert (move.event, again) == (CodeEvent.STAGE_UNANSWERED, timer)
    assert driver.handle(TimerFired(TimerName.STAGE)) == [timer]


# --- the run of the candidate -------------------------------------------------------------------------


def test_a_candidate_run_has_a_quorum_that_its_cohort_can_reach() -> None:
    driver = rolling(own=task_at(NEW, rounds=5))
    driver.handle(ready("c1"), TimerFired(TimerName.STAGE))
    request = OpenRun(task=NAME, run=RUN, plan=PLAN, overrides=RunOverrides(quorum=2))
    assert driver.handle(RunRequested(ID, request, "")) == [CheckFit(NEW, model(1))]
    task, plan = driver.machine.rollout.task_for_run(request)
    assert (task.code_version, plan.rounds, plan.quorum) == (NEW, 5, 1)


def test_a_candidate_without_a_key_of_the_options_is_reverted() -> None:
    driver = rolling()
    driver.handle(ready("c1"), ready("c2"), TimerFired(TimerName.CANDIDATE))
    request = OpenRun(task=NAME, run=RUN, plan=PLAN, overrides=RunOverrides(config={"lr": 0.1}))
    reason = "the run configuration of the task has no key `lr`: it has no keys"
    reply = Reply(ID, Refused(reason=reason))
    assert driver.handle(RunRequested(ID, request, "")) == [
        reply,
        *reverted(f"its trial run is refused: {reason}"),
    ]
    assert driver.handle(TimerFired(TimerName.CANDIDATE)) == []


def test_a_wrong_key_of_a_user_does_not_revert_the_candidate() -> None:
    driver = rolling()
    driver.handle(
        ready("c1"), ready("c2"), TimerFired(TimerName.CANDIDATE), CandidateRunAnswered("a run is active")
    )
    request = OpenRun(task=NAME, run=RUN, plan=PLAN, overrides=RunOverrides(config={"lr": 0.1}))
    (reply,) = driver.handle(RunRequested(ID, request, ""))
    assert isinstance(reply, Reply)
    assert driver.machine.rollout.is_rolling


def test_a_good_run_brings_the_candidate_to_every_client() -> None:
    driver = in_training_of_the_candidate()
    record = driver.machine._server
    record.state = ServerState.PUBLISHING
    record.data = record.data.model_copy(update={"checkpoint": artifact(2)})
    verdict = PromotionVerdict(promote=True, reason="better")
    driver.handle(VersionPublished(manifest(2), verdict, champion(2), keep=20))
    assert (
        driver.handle(model_offered(2))[-6:]
        == [
            *ENDS,
            MoveCode(
                CodeEvent.ROLLOUT_FINISHED,
                {"code_version": NEW, "previous": (OLD,), **NO_ROLLOUT},  # type: ignore[typeddict-item]  # NO_ROLLOUT is a plain dict
                NEW[:12],
            ),
            announced("", code_version=NEW),
            PruneCode(),
        ]
    )
    assert driver.machine.rollout.deployed_task.code_version == NEW


def test_a_failed_run_reverts_its_code() -> None:
    driver = in_training_of_the_candidate()
    effects = driver.handle(RunFailed(task=NAME, run=RUN, reason="it raised"))
    assert effects[-len(reverted("")) :] == reverted("run failed: it raised")


def test_a_run_of_other_code_does_not_judge_the_candidate() -> None:
    driver = in_training_of_the_candidate()
    record = driver.machine._server
    record.data = record.data.model_copy(update={"code_version": OLD})
    effects = driver.handle(RunFailed(task=NAME, run=RUN, reason="it raised"))
    assert driver.code_events == []
    assert effects[-2:] == TRY, "it is tried by a run of its own"


def test_a_run_that_a_store_blocked_is_repeated_after_a_pause() -> None:
    driver = in_training_of_the_candidate()
    driver.machine._server.state = ServerState.PUBLISHING
    effects = driver.handle(PublishFailed("access denied"))
    assert driver.code_events == []
    assert effects[-1] == StartTimer(TimerName.CANDIDATE, training_run.BLOCKED_RETRY_S)


def test_a_model_that_was_not_compared_repeats_the_trial() -> None:
    driver = in_training_of_the_candidate()
    driver.machine._server.state = ServerState.PUBLISHING
    verdict = PromotionVerdict(promote=False, was_compared=False, reason="another was promoted meanwhile")
    effects = driver.handle(VersionPublished(manifest(2), verdict, None, keep=20))
    assert effects[-3:] == [
        Log("info", "Candidate run was not evaluated; starting another trial run", {"code": NEW}),
        *TRY,
    ]


def test_the_next_stage_begins_after_a_good_run() -> None:
    driver = rolling("50%", "100%")
    (first,) = driver.machine.rollout.data.clients
    driver.handle(ready(first))
    record = driver.machine._server
    record.state = ServerState.PUBLISHING
    record.data = record.data.model_copy(update={**TRAINED, "code_version": NEW, "checkpoint": artifact(2)})
    verdict = PromotionVerdict(promote=True, reason="better")
    driver.handle(VersionPublished(manifest(2), verdict, champion(2), keep=20))
    assert driver.handle(model_offered(2))[-1] == ReadFleet()
    move, *others = driver.handle(FLEET)
    assert move == MoveCode(
        CodeEvent.STAGE_PASSED,
        {"stage": 1, "cohort": RolloutCohort(), "clients": ("c1", "c2"), "ready": (), "refused": {}},
        "50% passed",
    )
    assert others == [announced(), StartTimer(TimerName.STAGE, 300.0)]
    (second,) = {"c1", "c2"} - {first}
    assert driver.handle(ready(second))[-2:] == TRY


# --- a new lineage ------------------------------------------------------------------------------------


def test_a_candidate_of_another_architecture_gets_a_first_model() -> None:
    driver = rolling(new_lineage=True)
    driver.handle(ready("c1"), ready("c2"))
    assert driver.handle(TimerFired(TimerName.CANDIDATE)) == [BuildLineage(NEW)]
    assert not driver.machine.accepts(refuses("c1", "too late"))
    assert driver.handle(LineageBuilt(champion(2), NEW)) == [
        MoveServer(
            ServerEvent.LINEAGE_STARTED,
            {"model": model(2), "seal": None, "term": 2, "code_version": NEW},
            f"code {NEW[:12]}",
        ),
        OfferModel(model(2), receivers=0),
    ]
    driver.handle(model_offered(2))
    assert driver.code_events[-1] == "rollout_finished"


def test_a_first_model_that_does_not_build_reverts_the_rollout() -> None:
    driver = rolling(new_lineage=True)
    driver.handle(ready("c1"), ready("c2"), TimerFired(TimerName.CANDIDATE))
    assert driver.handle(LineageFailed("it does not build")) == reverted("it does not build")


def test_a_new_lineage_waits_for_the_end_of_a_run() -> None:
    driver = rolling(new_lineage=True)
    driver.machine._server.state = ServerState.TRAINING
    driver.machine._server.data = driver.machine._server.data.model_copy(update=TRAINED)
    driver.handle(ready("c1"), ready("c2"))
    assert driver.handle(TimerFired(TimerName.CANDIDATE)) == []
    assert driver.handle(RunFailed(task=NAME, run=RUN, reason="it raised"))[-2:] == TRY
    assert driver.handle(TimerFired(TimerName.CANDIDATE)) == [BuildLineage(NEW)]


# --- back ---------------------------------------------------------------------------------------------


def test_a_person_ends_a_rollout() -> None:
    driver = rolling()
    revert = RevertRequested(ID, "users complain")
    reply = Reply(ID, RolloutBegun(code_version=OLD))
    assert driver.handle(revert) == [*reverted("users complain"), reply]
    assert driver.handle(revert) == [Reply(ID, Refused(reason="no rollout is in progress"))]


def test_an_abandoned_candidate_is_rejected() -> None:
    driver = rolling()
    back = ProposedVersion(task_at(NEXT), ("100%",), revert_reason="both are bad")
    driver.handle(CodeProposed(back), FLEET)
    data = driver.machine.rollout.data
    assert (data.candidate, data.rejected) == (NEXT, {OLD: "both are bad", NEW: "both are bad"})


# --- after a restart ----------------------------------------------------------------------------------

ROLLING = CodeData(
    task=NAME, code_version=OLD, candidate=NEW, attempt=1, stages=("100%",), clients=("c1", "c2")
)


def started(driver: ServerDriver, event: ManagerStarted) -> list[Effect]:
    """The effects of the whole start."""
    driver.handle(event, store_is_usable(1), model_offered(1))
    return driver.effects


def test_a_restart_in_a_rollout_counts_the_answers_again() -> None:
    driver = ServerDriver(make_machine(ServerState.WAITING, code=ROLLING))
    effects = started(driver, ManagerStarted(task_at(OLD), task_at(NEW), (ready("c1"),)))
    assert effects[0] == StartTimer(TimerName.STAGE, 300.0)
    assert driver.handle(ready("c2"))[-2:] == TRY


def test_a_restart_tries_a_candidate_whose_cohort_was_ready() -> None:
    facts = ROLLING.model_copy(update={"ready": ("c1", "c2")})
    driver = ServerDriver(make_machine(ServerState.WAITING, code=facts))
    assert started(driver, ManagerStarted(task_at(OLD), task_at(NEW)))[1:3] == TRY


@pytest.mark.parametrize("candidate", [CodeUnusable("it is gone"), None], ids=["gone", "not loaded"])
def test_a_restart_reverts_a_candidate_that_cannot_be_loaded(candidate: CodeUnusable | None) -> None:
    driver = ServerDriver(make_machine(ServerState.WAITING, code=ROLLING))
    started(driver, ManagerStarted(task_at(OLD), candidate))
    assert driver.code_events == ["rollout_reverted"]


def test_a_restart_without_the_logs_code_deploys_its_own() -> None:
    driver = ServerDriver(make_machine(ServerState.WAITING, code=ROLLING, own=task_at(NEXT)))
    started(driver, ManagerStarted(CodeUnusable("no such commit")))
    reason = f"{OLD[:12]} is no longer available: no such commit"
    assert [one for one in driver.effects if isinstance(one, MoveCode)] == [
        MoveCode(CodeEvent.ROLLOUT_REVERTED, {"candidate": "", "clients": (), "ready": ()}, reason),
        MoveCode(CodeEvent.CODE_READ, {"code_version": NEXT}, reason),
    ]
    assert driver.machine.rollout.deployed_task.code_version == NEXT
