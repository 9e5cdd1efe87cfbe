"""The decisions of the server manager: each test hands in events and compares the whole list of effects."""

from datetime import timedelta

import pytest
from support.server_machine import (
    NAME,
    NEW,
    NOW,
    OLD,
    PLAN,
    RECRUIT_UNTIL,
    RUN,
    RUN_DATA,
    TRAINED,
    ServerDriver,
    artifact,
    blob,
    champion,
    make_machine,
    manifest,
    model,
    model_offered,
    replies_in,
    running_machine,
    store_is_usable,
    task_at,
)

from fedbus.agents.common.machine import (
    CancelTimer,
    FinishStartup,
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
    BuildFirstModel,
    BuildLineage,
    CheckFit,
    CheckFitAtStartup,
    CheckPromotion,
    CheckStore,
    FindFlowerServer,
    MoveServer,
    OfferModel,
    PromoteVersion,
    PublishVersion,
    ReadDeclined,
    ReadJoined,
    RecordRound,
    RecordRun,
    ReportFlowerServer,
    RetireVersions,
    StartFlowerServer,
    StopFlowerServer,
)
from fedbus.agents.server_manager.events import (
    CancelRequested,
    CodeProposed,
    DeclinedRead,
    Event,
    FirstModelFailed,
    FirstModelReady,
    FitChecked,
    FlowerServerFound,
    FlowerServerNotStarted,
    FlowerServerStarted,
    JoinedRead,
    LineageBuilt,
    LineageFailed,
    LineageRequested,
    ManagerStarted,
    OfferFailed,
    PromotionChecked,
    PromotionRefused,
    PromotionRequested,
    ProposedVersion,
    PublishFailed,
    RunRequested,
    StartupFitChecked,
    StoreChecked,
    TimerName,
    VersionPromoted,
    VersionPublished,
    VersionsRetired,
)
from fedbus.contracts.champion import ModelPromoted, PromoteModel, RollBackModel, StartLineage
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CodePublished
from fedbus.contracts.message import RefusalKind, Refused
from fedbus.contracts.run import RoundResult
from fedbus.contracts.server import (
    BeginTraining,
    CancelRun,
    ModelPublished,
    OpenRun,
    RoundFinished,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunOpened,
    ServerClosed,
    ServerEvent,
    ServerInfo,
    ServerLost,
    ServerStarted,
    ServerState,
    StartServer,
    StoreProblem,
    UpdateReady,
)
from fedbus.contracts.situations import ServerPublishing
from fedbus.domain.model_promotion import PromotionVerdict

ID = RequestId(7)
OPEN = RunRequested(ID, OpenRun(task=NAME, run=RUN, plan=PLAN), "00-trace")
CODE = CodePublished(task=NAME, code_version=OLD)
FLOWER = StartFlowerServer(
    StartServer(task=NAME, run=RUN, plan=PLAN, artifact=artifact(1), first_round=1, code_version=OLD)
)
STOPS_RECRUITING = CancelTimer(TimerName.RECRUITING)


def joined(client: str, code: str = OLD, run: str = RUN) -> ClientJoined:
    return ClientJoined(task=NAME, client=client, run=run, code_version=code)


def closed(outcome: str, reason: str = "", rounds: int = 0, *, new_model: bool = True) -> Publish:
    return Publish(
        ServerClosed.model_validate(
            {
                "task": NAME,
                "run": RUN,
                "outcome": outcome,
                "rounds": rounds,
                "reason": reason,
                "new_model": new_model,
            }
        )
    )


def refused(reason: str) -> Reply:
    return Reply(ID, Refused(reason=reason))


# --- the start ----------------------------------------------------------------------------------------


def test_the_first_start_builds_a_model_before_anything_else() -> None:
    driver = ServerDriver(make_machine(ServerState.MODEL_INIT))
    assert driver.handle(ManagerStarted(task_at(OLD))) == [BuildFirstModel(OLD)]
    served = champion(1)
    assert driver.handle(FirstModelReady(served, OLD)) == [
        CancelTimer(TimerName.STORE),
        MoveServer(
            ServerEvent.MODEL_READY,
            {"model": model(1), "seal": None, "term": 1, "code_version": OLD, "trouble": None},
        ),
        OfferModel(model(1), receivers=0),
    ]
    assert driver.handle(model_offered(1)) == [
        CheckFitAtStartup(OLD, model(1)),
        Publish(CODE),
        FinishStartup(),
    ]


def test_a_failed_build_is_published_once_and_repeated() -> None:
    driver = ServerDriver(make_machine(ServerState.MODEL_INIT))
    driver.handle(ManagerStarted(task_at(OLD)))
    failure = FirstModelFailed("NameError", None)
    assert driver.handle(failure) == [
        Log("warning", "Champion model unavailable", {"cause": "model_not_built", "reason": "NameError"}),
        MoveServer(ServerEvent.MODEL_NOT_BUILT, {"trouble": None}, "NameError"),
        RetryLater(TimerName.STORE, 0),
        Publish(CODE),
        FinishStartup(),
    ]
    assert driver.handle(OPEN) == [refused("NameError")]
    assert driver.handle(TimerFired(TimerName.STORE)) == [BuildFirstModel(OLD)]
    assert driver.handle(failure) == [RetryLater(TimerName.STORE, 1)]


def test_a_restart_first_compares_the_store_with_the_log() -> None:
    driver = ServerDriver(make_machine(ServerState.WAITING))
    assert driver.handle(ManagerStarted(task_at(OLD))) == [CheckStore(model(1), 1)]
    assert driver.handle(store_is_usable(1)) == [OfferModel(model(1), receivers=0)]
    assert driver.handle(model_offered(1)) == [
        CancelTimer(TimerName.STORE),
        CheckFitAtStartup(OLD, model(1)),
        Publish(CODE),
        FinishStartup(),
    ]


def test_a_restart_follows_a_champion_that_the_log_missed() -> None:
    driver = ServerDriver(make_machine(ServerState.WAITING))
    driver.handle(ManagerStarted(task_at(OLD)))
    assert driver.handle(store_is_usable(1, champion(2, term=5))) == [
        MoveServer(ServerEvent.MODEL_PROMOTED, {"model": model(2), "seal": None, "term": 5}),
        OfferModel(model(2), receivers=0),
    ]


def test_a_restart_publishes_the_end_of_the_last_run_again() -> None:
    end = {"event": ServerEvent.VERSION_PUBLISHED, "reason": "loss 0.4 against 0.5"}
    driver = ServerDriver(make_machine(ServerState.WAITING, **end, **TRAINED))  # type: ignore[arg-type]
    driver.handle(ManagerStarted(task_at(OLD)), store_is_usable(1))
    announced = ModelPublished(task=NAME, model=model(1), blob=blob(1), run=RUN, term=1)
    assert driver.handle(model_offered(1)) == [
        CancelTimer(TimerName.STORE),
        Publish(announced),
        closed("finished", "loss 0.4 against 0.5", rounds=2),
        RecordRun("finished"),
        CheckFitAtStartup(OLD, model(1)),
        Publish(CODE),
        FinishStartup(),
    ]


def test_a_restart_while_recruiting_counts_the_joined_clients() -> None:
    driver = ServerDriver(make_machine(ServerState.RECRUITING, **RUN_DATA))
    assert driver.handle(ManagerStarted(task_at(OLD))) == [ReadJoined()]
    read = JoinedRead((joined("c1"), joined("c9", run="tiny-9")))
    assert driver.handle(read) == [
        StartTimer(TimerName.RECRUITING, 30.0),
        ReportFlowerServer(RUN),
        CheckStore(model(1), 1),
    ]
    driver.handle(store_is_usable(1), model_offered(1))
    assert driver.handle(joined("c2")) == [
        STOPS_RECRUITING,
        MoveServer(ServerEvent.QUORUM_REACHED, {"cohort": ("c1", "c2")}),
        Publish(BeginTraining(task=NAME, run=RUN, cohort=("c1", "c2"))),
    ]


def test_a_restart_in_training_has_a_lost_server_reported() -> None:
    driver = ServerDriver(make_machine(ServerState.TRAINING, **TRAINED))
    driver.handle(ManagerStarted(task_at(OLD)))
    assert driver.handle(JoinedRead(())) == [ReportFlowerServer(RUN), CheckStore(model(1), 1)]


def test_a_restart_while_publishing_publishes_before_the_store_check() -> None:
    driver = ServerDriver(make_machine(ServerState.PUBLISHING, checkpoint=artifact(2), **TRAINED))
    (publish,) = driver.handle(ManagerStarted(task_at(OLD)))
    assert isinstance(publish, PublishVersion)
    assert publish.run.result == artifact(2)
    promoted = VersionPublished(
        manifest(2), PromotionVerdict(promote=True, reason="better"), champion(2), keep=20
    )
    assert driver.handle(promoted)[-1] == OfferModel(model(2), receivers=2)
    assert driver.handle(model_offered(2))[-3:] == [
        CheckFitAtStartup(OLD, model(2)),
        Publish(CODE),
        FinishStartup(),
    ]


def test_nothing_but_results_is_accepted_during_the_start() -> None:
    machine = make_machine(ServerState.WAITING)
    ServerDriver(machine).handle(ManagerStarted(task_at(OLD)))
    assert not machine.accepts(OPEN)
    assert not machine.accepts(joined("c1"))
    assert not machine.accepts(TimerFired(TimerName.STORE))
    assert machine.accepts(store_is_usable(1))


def test_a_misfit_at_the_start_is_only_logged() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    (effect,) = driver.handle(StartupFitChecked("w is (3,) there and (5,) here", model(1)))
    assert isinstance(effect, Log)
    assert "w is (3,)" in effect.data["reason"]


# --- opening a run ------------------------------------------------------------------------------------


def test_a_run_opens_if_its_code_fits_and_its_server_starts() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    assert driver.handle(OPEN) == [CheckFit(OLD, model(1))]
    assert driver.handle(FitChecked()) == [
        MoveServer(
            ServerEvent.RUN_REQUESTED,
            {
                "run": RUN,
                "plan": PLAN,
                "code_version": OLD,
                "base": model(1),
                "candidate": None,
                "recruit_until": RECRUIT_UNTIL,
                "cohort": (),
                "round": 0,
                "trainings": 0,
                "failures": 0,
                "last": None,
                "checkpoint": None,
                "recoveries": 0,
                "missing": 0,
                "traceparent": "00-trace",
            },
            deadline=RECRUIT_UNTIL,
        ),
        FLOWER,
    ]
    assert driver.handle(FlowerServerStarted(RUN)) == [
        StartTimer(TimerName.RECRUITING, 30.0),
        Reply(ID, RunOpened(recruit_until=RECRUIT_UNTIL)),
    ]
    assert driver.handle(OPEN) == [Reply(ID, RunOpened(recruit_until=RECRUIT_UNTIL))], "a repeated request"


def test_a_run_whose_code_does_not_fit_names_the_tensor() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    driver.handle(OPEN)
    (reply,) = replies_in(driver.handle(FitChecked("w is float32 (3,) there")))
    assert isinstance(reply, Refused)
    assert "version 1, which is served, does not fit the task's code: w is float32 (3,)" in reply.reason
    assert driver.handle(OPEN) == [CheckFit(OLD, model(1))]
    assert driver.handle(FitChecked(store_error="the store is down")) == [refused("the store is down")]


def test_a_second_run_is_refused_while_one_is_under_way() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    other = RunRequested(ID, OpenRun(task=NAME, run="tiny-2", plan=PLAN), "")
    assert driver.handle(other) == [refused("the server of tiny is training with tiny-1")]


@pytest.mark.parametrize("kind", [RefusalKind.CALLER, RefusalKind.NEEDS_OPERATOR])
def test_a_flower_server_that_does_not_start_fails_the_run(kind: RefusalKind) -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    driver.handle(OPEN, FitChecked())
    refusal = Refused(reason="no such app", kind=kind)
    assert driver.handle(FlowerServerNotStarted(RUN, refusal)) == [
        STOPS_RECRUITING,
        MoveServer(ServerEvent.RUN_FAILED, reason="no such app"),
        closed("failed", "no such app"),
        RecordRun("failed"),
        Reply(ID, refusal),
    ]


def test_a_server_that_starts_after_a_cancellation_is_stopped() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    driver.handle(OPEN, FitChecked())
    cancel = CancelRequested(RequestId(8), CancelRun(task=NAME, run=RUN, reason="enough"))
    assert driver.handle(cancel) == [
        StopFlowerServer(RUN),
        STOPS_RECRUITING,
        MoveServer(ServerEvent.RUN_CANCELLED, reason="enough"),
        closed("cancelled", "enough"),
        RecordRun("cancelled"),
        Reply(RequestId(8), RunCancelled()),
    ]
    other = RunRequested(ID, OpenRun(task=NAME, run="tiny-2", plan=PLAN), "")
    assert not driver.machine.accepts(other), "the first start has no result yet"
    assert driver.handle(FlowerServerStarted(RUN)) == [
        StopFlowerServer(RUN),
        Reply(ID, RunOpened(recruit_until=RECRUIT_UNTIL)),
    ]
    assert driver.machine.accepts(other)


# --- recruiting ---------------------------------------------------------------------------------------


def test_a_flower_server_that_is_up_invites_the_clients() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, traceparent="00-trace", **RUN_DATA))
    invitation = UpdateReady(
        task=NAME,
        run=RUN,
        plan=PLAN,
        recruit_until=RECRUIT_UNTIL,
        code_version=OLD,
        model=model(1),
        traceparent="00-trace",
    )
    assert driver.handle(ServerStarted(task=NAME, run=RUN)) == [Publish(invitation)]
    assert driver.machine.health(NOW).open_run == invitation


def test_the_quorum_starts_the_training_and_counts_clients_once() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    assert driver.handle(joined("c1")) == []
    assert driver.handle(joined("c1")) == []
    assert driver.handle(joined("c9", code=NEW)) == [
        Log("warning", "Ignoring a client with another code version", {"client": "c9", "code": NEW})
    ]
    assert driver.handle(joined("c2")) == [
        STOPS_RECRUITING,
        MoveServer(ServerEvent.QUORUM_REACHED, {"cohort": ("c1", "c2")}),
        Publish(BeginTraining(task=NAME, run=RUN, cohort=("c1", "c2"))),
    ]


def test_expired_recruiting_names_joined_and_declined_clients() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    driver.handle(joined("c1"))
    assert driver.handle(TimerFired(TimerName.RECRUITING)) == [ReadDeclined(RUN)]
    reason = "1 of 2 clients joined in time (c1); c2 declined: its battery is low"
    assert driver.handle(DeclinedRead({"c1": "it was busy", "c2": "its battery is low"})) == [
        StopFlowerServer(RUN),
        STOPS_RECRUITING,
        MoveServer(ServerEvent.RECRUITING_EXPIRED, {"missing": 1}, reason),
        closed("failed", reason),
        RecordRun("failed"),
    ]


def test_a_late_recruiting_deadline_changes_nothing() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    assert driver.handle(TimerFired(TimerName.RECRUITING)) == []


# --- training -----------------------------------------------------------------------------------------


def test_a_round_is_added_up_with_the_clients_that_joined_since() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **{**TRAINED, "round": 0, "trainings": 0}))
    driver.handle(joined("late"))
    result = RoundResult(round=1, participants={"c1": 10}, failures={"c2": "out of memory"})
    message = RoundFinished(task=NAME, run=RUN, round=1, result=result, checkpoint=artifact(5))
    assert driver.handle(message) == [
        MoveServer(
            ServerEvent.ROUND_FINISHED,
            {
                "round": 1,
                "trainings": 2,
                "failures": 1,
                "last": result,
                "checkpoint": artifact(5),
                "cohort": ("c1", "c2", "late"),
            },
        ),
        RecordRound(result),
    ]


def test_a_late_client_is_invited_for_as_long_as_a_round_lasts() -> None:
    invitation = running_machine(ServerState.TRAINING, **TRAINED).health(NOW).open_run
    assert invitation is not None
    assert invitation.recruit_until == NOW + timedelta(seconds=PLAN.round_s)


def test_a_message_of_another_run_changes_nothing() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    assert driver.handle(RunFailed(task=NAME, run="tiny-9", reason="not yours")) == []


def test_a_lost_server_is_started_again_at_the_last_stored_round() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, checkpoint=artifact(5), **TRAINED))
    lost = ServerLost(task=NAME, run=RUN, reason="it was killed")
    assert driver.handle(lost) == [FindFlowerServer(RUN, "it was killed")]
    assert not driver.machine.accepts(lost), "it is being looked for"
    again = StartServer(task=NAME, run=RUN, plan=PLAN, artifact=artifact(5), first_round=3, code_version=OLD)
    assert driver.handle(FlowerServerFound(RUN, is_up=False, reason="it was killed")) == [
        MoveServer(ServerEvent.SERVER_LOST, {"recoveries": 1}, "it was killed"),
        StartFlowerServer(again),
    ]
    assert not driver.machine.accepts(lost), "it is being started"
    assert driver.handle(FlowerServerStarted(RUN)) == []
    assert driver.handle(ServerStarted(task=NAME, run=RUN)) == [
        MoveServer(ServerEvent.SERVER_RECOVERED, {"cohort": ("c1", "c2")}),
        Publish(BeginTraining(task=NAME, run=RUN, cohort=("c1", "c2"))),
    ]


def test_a_loss_that_is_out_of_date_changes_nothing() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    driver.handle(ServerLost(task=NAME, run=RUN, reason="an earlier one was killed"))
    assert driver.handle(FlowerServerFound(RUN, is_up=True, reason="an earlier one was killed")) == []


def test_a_server_that_is_lost_too_often_is_given_up() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, recoveries=PLAN.max_recoveries, **TRAINED))
    driver.handle(ServerLost(task=NAME, run=RUN, reason="it was killed"))
    effects = driver.handle(FlowerServerFound(RUN, is_up=False, reason="it was killed"))
    reason = "it was killed; not resumed after 2 recoveries (limit 2)"
    assert effects[1] == MoveServer(ServerEvent.RUN_FAILED, reason=reason)


def test_a_server_that_is_lost_while_recruiting_fails_the_run() -> None:
    driver = ServerDriver(running_machine(ServerState.RECRUITING, **RUN_DATA))
    driver.handle(ServerLost(task=NAME, run=RUN, reason="it was killed"))
    effects = driver.handle(FlowerServerFound(RUN, is_up=False, reason="it was killed"))
    assert (
        MoveServer(ServerEvent.RUN_FAILED, reason="it was killed, while the server was recruiting") in effects
    )


# --- the end of a run, in one direction ---------------------------------------------------------------


def test_a_finished_run_becomes_champion_before_it_is_announced() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    deadline = NOW + timedelta(seconds=training_run.PUBLISH_S)
    finished = RunFinished(task=NAME, run=RUN, rounds=2, artifact=artifact(2))
    move, publish = driver.handle(finished)
    assert move == MoveServer(
        ServerEvent.RUN_FINISHED, {"checkpoint": artifact(2), "round": 2}, deadline=deadline
    )
    assert publish == PublishVersion(
        ServerPublishing(
            run=RUN,
            plan=PLAN,
            recruit_until=RECRUIT_UNTIL,
            code_version=OLD,
            model=model(1),
            base=model(1),
            cohort=("c1", "c2"),
            traceparent="",
            round=2,
            trainings=4,
            failures=0,
            last=None,
            result=artifact(2),
        ),
        task_at(OLD),
    )
    verdict = PromotionVerdict(promote=True, reason="loss 0.4 against 0.5")
    assert driver.handle(VersionPublished(manifest(2), verdict, champion(2), keep=20)) == [
        MoveServer(
            ServerEvent.VERSION_PUBLISHED,
            {"model": model(2), "seal": None, "term": 2, "candidate": model(2)},
            "loss 0.4 against 0.5",
        ),
        OfferModel(model(2), receivers=2),
    ]
    assert driver.handle(model_offered(2)) == [
        Publish(ModelPublished(task=NAME, model=model(2), blob=blob(2), run=RUN, term=2)),
        closed("finished", rounds=2),
        RecordRun("finished"),
        RetireVersions(20, frozenset({model(1).sha256, model(2).sha256})),
    ]
    other = RunRequested(ID, OpenRun(task=NAME, run="tiny-2", plan=PLAN), "")
    assert not [one for one in (other, PROMOTE) if driver.machine.accepts(one)], "old weights are deleted"
    assert driver.handle(VersionsRetired()) == []
    assert driver.machine.accepts(other)


def test_a_version_that_the_gate_rejects_leaves_the_champion() -> None:
    driver = ServerDriver(running_machine(ServerState.PUBLISHING, checkpoint=artifact(2), **TRAINED))
    verdict = PromotionVerdict(promote=False, reason="loss 0.8, champion 0.5")
    reason = "version 2 is not promoted: loss 0.8, champion 0.5"
    assert driver.handle(VersionPublished(manifest(2), verdict, None, keep=20)) == [
        STOPS_RECRUITING,
        MoveServer(ServerEvent.CANDIDATE_KEPT, {"candidate": model(2)}, reason),
        closed("finished", reason, rounds=2, new_model=False),
        RecordRun("finished"),
        RetireVersions(20, frozenset({model(1).sha256, model(2).sha256})),
    ]


def test_a_store_that_takes_no_version_fails_the_run() -> None:
    driver = ServerDriver(running_machine(ServerState.PUBLISHING, checkpoint=artifact(2), **TRAINED))
    assert driver.handle(PublishFailed("latest is corrupt")) == [
        STOPS_RECRUITING,
        MoveServer(ServerEvent.VERSION_REFUSED, reason="latest is corrupt"),
        closed("failed", "latest is corrupt", rounds=2),
        RecordRun("failed"),
    ]


def test_a_champion_that_cannot_be_offered_is_not_announced() -> None:
    driver = ServerDriver(running_machine(ServerState.PUBLISHING, checkpoint=artifact(2), **TRAINED))
    verdict = PromotionVerdict(promote=True, reason="better")
    driver.handle(VersionPublished(manifest(2), verdict, champion(2), keep=20))
    effects = driver.handle(OfferFailed("access denied", StoreProblem.DENIED))
    assert effects[1:4] == [
        MoveServer(ServerEvent.STORE_UNAVAILABLE, {"trouble": StoreProblem.DENIED}, "access denied"),
        RetryLater(TimerName.STORE, 0),
        closed("finished", rounds=2),
    ]


def test_a_run_without_any_update_fails() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, failures=4, **TRAINED))
    effects = driver.handle(RunFinished(task=NAME, run=RUN, rounds=2, artifact=artifact(2)))
    assert effects[1] == MoveServer(
        ServerEvent.RUN_FAILED, reason="no client's update is in any of the 2 rounds"
    )


def test_a_run_that_is_over_cannot_be_cancelled() -> None:
    driver = ServerDriver(running_machine(ServerState.PUBLISHING, checkpoint=artifact(2), **TRAINED))
    cancel = CancelRequested(ID, CancelRun(task=NAME, run=RUN, reason="enough"))
    assert driver.handle(cancel) == [refused("tiny-1 is not under way: the server is publishing")]


# --- another champion by request ----------------------------------------------------------------------

PROMOTE = PromotionRequested(ID, PromoteModel(task=NAME, model_version=3, reason="it is right"))
ROLL_BACK = PromotionRequested(ID, RollBackModel(task=NAME, reason="poisoned"))


def test_a_promotion_is_checked_made_announced_and_then_answered() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    assert driver.handle(PROMOTE) == [CheckPromotion(3, model(1), OLD)]
    assert driver.handle(PromotionChecked(3)) == [PromoteVersion(3, "it is right")]
    assert driver.handle(VersionPromoted(champion(3, term=2))) == [
        MoveServer(ServerEvent.MODEL_PROMOTED, {"model": model(3), "seal": None, "term": 2}, "it is right"),
        OfferModel(model(3), receivers=2),
    ]
    announced = ModelPublished(task=NAME, model=model(3), blob=blob(3), run=RUN, term=2, reason="it is right")
    assert driver.handle(model_offered(3)) == [
        Publish(announced),
        Reply(ID, ModelPromoted(model=model(3), instead_of=1)),
    ]


def test_a_rollback_without_a_version_uses_the_previous_champion() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    assert driver.handle(ROLL_BACK) == [CheckPromotion(None, model(1), OLD)]
    assert driver.handle(PromotionRefused("there is none")) == [refused("there is none")]
    driver.handle(ROLL_BACK)
    assert driver.handle(PromotionChecked(1)) == [refused("version 1 is served already")]


def test_only_a_promotion_may_name_the_champion_itself() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    again = PromotionRequested(ID, PromoteModel(task=NAME, model_version=1))
    back = PromotionRequested(ID, RollBackModel(task=NAME, to=1))
    assert driver.handle(back) == [refused("version 1 is served already")]
    assert driver.handle(again, PromotionChecked(1)) == [PromoteVersion(1, "promoted by hand")]


def test_without_a_model_there_is_nothing_to_promote() -> None:
    driver = ServerDriver(make_machine(ServerState.MODEL_INIT))
    driver.handle(ManagerStarted(task_at(OLD)), FirstModelFailed("it is down", StoreProblem.UNAVAILABLE))
    assert driver.handle(PROMOTE) == [refused("there is no model yet: wait for the first one")]
    (reply,) = replies_in(driver.handle(LineageRequested(ID, StartLineage(task=NAME))))
    assert "there is no model yet" in str(reply)


def test_a_new_lineage_begins_with_a_first_model_of_its_own() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    wider = LineageRequested(ID, StartLineage(task=NAME, reason="a wider layer"))
    assert driver.handle(wider) == [BuildLineage(OLD)]
    assert driver.handle(LineageFailed("it does not build")) == [refused("it does not build")]
    driver.handle(wider)
    assert driver.handle(LineageBuilt(champion(2), OLD)) == [
        MoveServer(
            ServerEvent.LINEAGE_STARTED,
            {"model": model(2), "seal": None, "term": 2, "code_version": OLD},
            "a wider layer",
        ),
        OfferModel(model(2), receivers=0),
    ]
    assert replies_in(driver.handle(model_offered(2))) == [ModelPromoted(model=model(2), instead_of=1)]


def test_a_lineage_does_not_begin_during_a_run() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    (reply,) = replies_in(driver.handle(LineageRequested(ID, StartLineage(task=NAME))))
    assert "between two runs" in str(reply)


# --- the store ----------------------------------------------------------------------------------------


def unusable(reason: str, trouble: StoreProblem, *, has_file: bool = False) -> StoreChecked:
    return StoreChecked(model(1), None, has_file, reason, trouble)


def test_an_unusable_store_is_published_once_and_checked_again() -> None:
    driver = ServerDriver(make_machine(ServerState.WAITING))
    driver.handle(ManagerStarted(task_at(OLD)))
    trouble = unusable("it does not answer", StoreProblem.UNAVAILABLE)
    assert driver.handle(trouble)[1:] == [
        MoveServer(
            ServerEvent.STORE_UNAVAILABLE, {"trouble": StoreProblem.UNAVAILABLE}, "it does not answer"
        ),
        RetryLater(TimerName.STORE, 0),
        CheckFitAtStartup(OLD, model(1)),
        Publish(CODE),
        FinishStartup(),
    ]
    assert driver.machine.info() == Refused(
        reason="task tiny has no model to give out now: it does not answer"
    )
    assert driver.handle(TimerFired(TimerName.STORE)) == [CheckStore(model(1), 1)]
    assert driver.handle(trouble) == [RetryLater(TimerName.STORE, 1)]
    assert driver.handle(OPEN) == [refused("it does not answer")]
    driver.handle(TimerFired(TimerName.STORE))
    assert driver.handle(store_is_usable(1)) == [OfferModel(model(1), receivers=0)]
    assert driver.handle(model_offered(1)) == [
        Publish(ModelPublished(task=NAME, model=model(1), blob=blob(1), term=1)),
        CancelTimer(TimerName.STORE),
        MoveServer(ServerEvent.STORE_RECOVERED, {"trouble": None}),
    ]
    info = driver.machine.info()
    assert isinstance(info, ServerInfo)
    assert (info.model, info.blob) == (model(1), blob(1))


def test_a_local_copy_is_offered_while_the_store_is_down() -> None:
    driver = ServerDriver(make_machine(ServerState.WAITING))
    driver.handle(ManagerStarted(task_at(OLD)))
    trouble = unusable("it does not answer", StoreProblem.UNAVAILABLE, has_file=True)
    assert driver.handle(trouble) == [OfferModel(model(1), receivers=0)]
    effects = driver.handle(model_offered(1))
    assert effects[0] == Publish(ModelPublished(task=NAME, model=model(1), blob=blob(1), term=1))
    assert driver.server_events == ["store_unavailable"]


def test_a_check_of_a_former_champion_is_repeated() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING, model=model(2), term=2))
    driver.handle(TimerFired(TimerName.STORE))
    assert driver.handle(store_is_usable(1)) == [CheckStore(model(2), 2)]


# --- which events wait --------------------------------------------------------------------------------


def test_requests_wait_while_a_version_is_published() -> None:
    machine = running_machine(ServerState.PUBLISHING, checkpoint=artifact(2), **TRAINED)
    waiting: list[Event] = [OPEN, PROMOTE, LineageRequested(ID, StartLineage(task=NAME)), store_is_usable(1)]
    assert not [event for event in waiting if machine.accepts(event)]
    assert machine.accepts(joined("late"))
    assert machine.accepts(CodeProposed(ProposedVersion(task_at(NEW), ("100%",))))


def test_a_finished_run_waits_for_the_check_of_a_promotion() -> None:
    driver = ServerDriver(running_machine(ServerState.TRAINING, **TRAINED))
    driver.handle(PROMOTE)
    assert not driver.machine.accepts(RunFinished(task=NAME, run=RUN, rounds=2, artifact=artifact(2)))
    assert driver.machine.accepts(joined("late"))
    driver.handle(PromotionRefused("it is corrupt"))
    assert driver.machine.accepts(RunFinished(task=NAME, run=RUN, rounds=2, artifact=artifact(2)))


def test_code_and_champion_do_not_change_during_the_fit_check() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    driver.handle(OPEN)
    proposal = CodeProposed(ProposedVersion(task_at(NEW), ("100%",)))
    assert not [event for event in (proposal, PROMOTE, OPEN) if driver.machine.accepts(event)]
