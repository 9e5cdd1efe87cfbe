"""The decisions of the server manager on its start, its store and its champion: events in, effects out."""

from support.server_effects import (
    CODE,
    ID,
    OPEN,
    PROMOTE,
    STOPS_RECRUITING,
    closed,
    joined,
    refused,
)
from support.server_machine import (
    NAME,
    NEW,
    OLD,
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
    RetryLater,
    StartTimer,
    TimerFired,
)
from fedbus.agents.server_manager.effects import (
    BuildFirstModel,
    BuildLineage,
    CheckFitAtStartup,
    CheckPromotion,
    CheckStore,
    MoveServer,
    OfferModel,
    PromoteVersion,
    PublishVersion,
    ReadJoined,
    RecordRun,
    ReportFlowerServer,
)
from fedbus.agents.server_manager.events import (
    CodeProposed,
    Event,
    FirstModelFailed,
    FirstModelReady,
    JoinedRead,
    LineageBuilt,
    LineageFailed,
    LineageRequested,
    ManagerStarted,
    PromotionChecked,
    PromotionRefused,
    PromotionRequested,
    ProposedVersion,
    StartupFitChecked,
    StoreChecked,
    TimerName,
    VersionPromoted,
    VersionPublished,
)
from fedbus.contracts.champion import ModelPromoted, PromoteModel, RollBackModel, StartLineage
from fedbus.contracts.flower_server import BeginTraining, RunFinished
from fedbus.contracts.message import Refused
from fedbus.contracts.server import ModelPublished, ServerEvent, ServerInfo, ServerState, StoreProblem
from fedbus.domain.model_promotion import PromotionVerdict

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
    driver = ServerDriver(make_machine(ServerState.WAITING, **end, **TRAINED))  # type: ignore[arg-type]  # a dict of mixed fields
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


# --- another champion by request ----------------------------------------------------------------------

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
    assert driver.handle(PromotionChecked(1)) == [refused("version 1 is the champion already")]


def test_only_a_promotion_may_name_the_champion_itself() -> None:
    driver = ServerDriver(running_machine(ServerState.WAITING))
    again = PromotionRequested(ID, PromoteModel(task=NAME, model_version=1))
    back = PromotionRequested(ID, RollBackModel(task=NAME, to=1))
    assert driver.handle(back) == [refused("version 1 is the champion already")]
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
    assert driver.machine.info() == Refused(reason="task tiny cannot offer its model now: it does not answer")
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
