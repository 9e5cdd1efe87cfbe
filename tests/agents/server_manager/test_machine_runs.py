"""The decisions of the server manager on a run, from its opening to its end."""

from datetime import timedelta

import pytest
from support.server_effects import FLOWER, ID, OPEN, PROMOTE, STOPS_RECRUITING, closed, joined, refused
from support.server_machine import (
    NAME,
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
    manifest,
    model,
    model_offered,
    replies_in,
    running_machine,
    task_at,
)

from fedbus.agents.common.machine import Publish, Reply, RequestId, RetryLater, StartTimer
from fedbus.agents.server_manager import training_run
from fedbus.agents.server_manager.effects import (
    CheckFit,
    FindFlowerServer,
    MoveServer,
    OfferModel,
    PublishVersion,
    RecordRound,
    RecordRun,
    RetireVersions,
    StartFlowerServer,
    StopFlowerServer,
)
from fedbus.agents.server_manager.events import (
    CancelRequested,
    FitChecked,
    FlowerServerFound,
    FlowerServerNotStarted,
    FlowerServerStarted,
    OfferFailed,
    PublishFailed,
    RunRequested,
    TimerName,
    VersionPublished,
    VersionsRetired,
)
from fedbus.agents.server_manager.machine import ServerMachine
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
from fedbus.contracts.run import RoundResult, RunOverrides, Scalar
from fedbus.contracts.server import (
    CancelRun,
    ModelPublished,
    OpenRun,
    RunCancelled,
    RunOpened,
    ServerEvent,
    ServerState,
    StoreProblem,
)
from fedbus.contracts.situations import ServerPublishing
from fedbus.domain.model_promotion import PromotionVerdict

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
    assert "the champion, version 1, does not fit the task's code: w is float32 (3,)" in reply.reason
    assert driver.handle(OPEN) == [CheckFit(OLD, model(1))]
    assert driver.handle(FitChecked(store_error="the store is down")) == [refused("the store is down")]


def machine_with_config() -> ServerMachine:
    """A machine without a run, whose task has a run configuration."""
    own = task_at(OLD).model_copy(update={"run_config": {"lr": 0.5, "rounds": 3}})
    machine = running_machine(ServerState.WAITING)
    machine.rollout._deployed = own
    return machine


def test_the_run_configuration_has_the_types_of_the_task() -> None:
    driver = ServerDriver(machine_with_config())
    plan = PLAN.model_copy(update={"config": {"lr": 1}})
    driver.handle(RunRequested(ID, OpenRun(task=NAME, run=RUN, plan=plan), ""), FitChecked())
    opened = driver.machine._server.data.plan
    assert opened is not None
    assert (opened.config, type(opened.config["lr"])) == ({"lr": 1.0}, float)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"lrr": 0.1}, "the run configuration of the task has no key `lrr`: did you mean `lr`?"),
        ({"lr": "fast"}, "`lr` = 'fast': use a finite number; the task has 0.5"),
    ],
)
@pytest.mark.parametrize("is_planned", [True, False])
def test_a_run_configuration_that_does_not_fit_is_refused(
    config: dict[str, Scalar], reason: str, *, is_planned: bool
) -> None:
    driver = ServerDriver(machine_with_config())
    if is_planned:
        request = OpenRun(task=NAME, run=RUN, plan=PLAN.model_copy(update={"config": config}))
    else:
        request = OpenRun(task=NAME, run=RUN, plan=PLAN, overrides=RunOverrides(config=config))
    assert driver.handle(RunRequested(ID, request, "")) == [refused(reason)]
    assert driver.handle(OPEN) == [CheckFit(OLD, model(1))], "the next run opens"


def test_a_second_run_is_refused_during_a_run() -> None:
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
    assert driver.handle(cancel) == [refused("tiny-1 is not in progress: the server is publishing")]
