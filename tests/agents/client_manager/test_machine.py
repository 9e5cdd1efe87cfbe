"""The decisions of the client manager at its start and in a run: events in, effects out."""

import pytest
from support.client_effects import (
    ENDS_RUN,
    JOINS,
    STARTS_APPLY,
    STARTS_BOOTSTRAP,
    STARTS_SEARCH,
    STOPS_APPLY,
    code_ready,
    code_refused,
    declines,
    fail_train,
    fetches,
    fetches_first,
    fin_train,
    fired,
    ignored,
    moves,
    starts,
    starts_join,
    updates,
)
from support.client_machine import (
    LABELS,
    LEARN_S,
    RUN_TRACE,
    infer_ready,
    infer_refused,
    learning_client,
    make_invitation,
    model_announced,
    new_client,
    server_info,
    serving_client,
    starting_client,
)
from support.server_machine import NEW, OLD, RUN, model, task_at

from fedbus.agents.client_manager.effects import (
    EnrollClient,
    Fail,
    JoinTrace,
    MoveClient,
    OpenInbox,
    PrepareCode,
    ReadDeviceFacts,
    ReadOpenRun,
    SwitchCode,
    TakeSlot,
)
from fedbus.agents.client_manager.events import (
    ClientManagerStarted,
    ClientTimer,
    CodeNotPrepared,
    CodePrepared,
    DeviceFactsRead,
    EnrollmentAnswered,
    Event,
    ModelFetched,
    ModelNotFetched,
    OpenRunRead,
    ServerInfoRead,
    SlotsBusy,
    SlotTaken,
)
from fedbus.agents.client_manager.machine import APPLY_S, SLOT_AGAIN_S, SYNC_S
from fedbus.agents.common.machine import (
    CancelTimer,
    FinishStartup,
    Log,
    RetryLater,
    StartTimer,
)
from fedbus.contracts.client import (
    ClientEvent,
    ClientState,
    FailTrain,
    FinTrain,
)
from fedbus.contracts.code import CodePlan

# --- the start ------------------------------------------------------------------------------------


def test_a_new_client_enrolls_before_it_subscribes() -> None:
    client = new_client()
    assert client.handle(ClientManagerStarted()) == [STARTS_BOOTSTRAP, EnrollClient()]
    assert client.handle(EnrollmentAnswered()) == [OpenInbox(), STARTS_BOOTSTRAP, *STARTS_SEARCH]


@pytest.mark.parametrize(
    "state",
    [
        ClientState.PENDING_APPLICATION,
        ClientState.SERVING,
        ClientState.SYNCING,
        ClientState.LEARNING,
        ClientState.TERMINATED,
    ],
)
def test_a_restarted_client_leaves_its_run_and_starts_again(state: ClientState) -> None:
    client = new_client(state, model=model(1), run=RUN, code_version=NEW, labels={})
    changes = {"run": None, "code_version": OLD, "labels": LABELS}
    assert client.handle(ClientManagerStarted()) == [
        MoveClient(ClientEvent.RESTARTED, changes),  # type: ignore[arg-type]  # the changes are those of several entities
        STARTS_BOOTSTRAP,
        EnrollClient(),
    ]


def test_a_refused_enrollment_ends_the_agent() -> None:
    client = new_client()
    client.handle(ClientManagerStarted())
    assert client.handle(EnrollmentAnswered("not in this federation")) == [
        MoveClient(ClientEvent.BOOTSTRAP_FAILED, reason="not in this federation"),
        Fail("client c1 cannot start: not in this federation"),
    ]
    assert client.state is ClientState.TERMINATED


def test_the_first_model_is_fetched_and_handed_over() -> None:
    client = new_client()
    client.handle(ClientManagerStarted(), EnrollmentAnswered())
    assert client.handle(server_info(1)) == [fetches_first(1)]
    assert client.handle(ModelFetched(model(1))) == [
        moves(ClientEvent.MODEL_FETCHED, 1, code_version=OLD),
        CancelTimer(ClientTimer.BOOTSTRAP),
        STARTS_APPLY,
        starts(1),
        FinishStartup(),
    ]
    assert client.handle(infer_ready(1)) == [STOPS_APPLY, moves(ClientEvent.INFER_READY, 1), ReadOpenRun()]


def test_a_missing_first_model_is_logged_once_and_awaited() -> None:
    client = new_client()
    client.handle(ClientManagerStarted(), EnrollmentAnswered())
    none_yet = ServerInfoRead(None, "no model yet")
    assert client.handle(none_yet) == [
        Log("info", "No model yet", {"reason": "no model yet"}),
        RetryLater(ClientTimer.MODEL, 0),
    ]
    assert client.handle(fired(ClientTimer.MODEL)) == STARTS_SEARCH
    assert client.handle(none_yet) == [RetryLater(ClientTimer.MODEL, 1)]
    client.handle(fired(ClientTimer.MODEL), server_info(1))
    assert client.handle(ModelNotFetched(model(1), "it is not signed")) == [
        Log("warning", "No model yet", {"reason": "it is not signed"}),
        RetryLater(ClientTimer.MODEL, 2),
    ]


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], "no server of tiny answered within 10 s"),
        ([EnrollmentAnswered()], "no server of tiny answered within 10 s"),
        (
            [EnrollmentAnswered(), ServerInfoRead(None, "no model yet")],
            "no model in time (limit 10 s): no model yet",
        ),
        ([EnrollmentAnswered(), server_info(1)], "model version 1 was not fetched in time (limit 10 s)"),
        (
            [EnrollmentAnswered(), server_info(1, code=CodePlan(code_version=NEW))],
            "code bbbbbbbbbbbb was not ready in time (limit 10 s)",
        ),
    ],
    ids=["enrolling", "asking", "searching", "fetching", "catching up"],
)
def test_a_start_that_takes_too_long_ends_the_agent(events: list[Event], reason: str) -> None:
    client = new_client()
    client.handle(ClientManagerStarted(), *events)
    assert client.handle(fired(ClientTimer.BOOTSTRAP)) == [
        MoveClient(ClientEvent.BOOTSTRAP_FAILED, reason=reason),
        Fail(f"client c1 cannot start: {reason}"),
    ]


def test_a_device_changes_its_code_before_it_serves() -> None:
    client = new_client()
    client.handle(ClientManagerStarted(), EnrollmentAnswered())
    plan = CodePlan(code_version=NEW, attempt=3)
    assert client.handle(server_info(1, code=plan)) == [PrepareCode(NEW, SYNC_S)]
    new = task_at(NEW)
    assert client.handle(CodePrepared(new)) == [SwitchCode(new), code_ready(NEW, 3), fetches_first(1)]
    assert client.handle(ModelFetched(model(1)))[0] == moves(ClientEvent.MODEL_FETCHED, 1, code_version=NEW)


def test_a_device_starts_with_old_code_if_the_new_is_unusable() -> None:
    client = new_client()
    client.handle(ClientManagerStarted(), EnrollmentAnswered())
    client.handle(server_info(1, code=CodePlan(code_version=NEW)))
    assert client.handle(CodeNotPrepared(NEW, "not signed")) == [
        *code_refused(NEW, "not signed"),
        fetches_first(1),
    ]


def test_an_answer_of_an_earlier_start_is_ignored() -> None:
    client = new_client()
    client.handle(ClientManagerStarted(), EnrollmentAnswered())
    assert client.handle(infer_ready(1)) == ignored("infer_ready", ClientState.S0)
    assert client.handle(EnrollmentAnswered("too late")) == []


# --- training -------------------------------------------------------------------------------------


def test_an_invited_client_joins_in_the_trace_of_the_run() -> None:
    client = serving_client()
    assert client.handle(make_invitation()) == starts_join()
    assert client.handle(SlotTaken()) == JOINS
    assert client.data.run == RUN


def test_an_invitation_to_its_own_run_changes_nothing() -> None:
    client = learning_client()
    assert client.handle(make_invitation()) == []
    assert client.handle(OpenRunRead(make_invitation())) == []


def test_a_learning_client_declines_another_run() -> None:
    client = learning_client()
    assert client.handle(make_invitation("tiny-2")) == [
        JoinTrace(RUN_TRACE),
        declines("this client is learning", "tiny-2"),
    ]


def test_a_run_of_other_code_is_declined() -> None:
    client = serving_client()
    reason = "the run is on code bbbbbbbbbbbb, this client on aaaaaaaaaaaa"
    assert client.handle(make_invitation(code_version=NEW)) == [JoinTrace(RUN_TRACE), declines(reason)]


def test_a_run_that_has_stopped_recruiting_is_declined() -> None:
    client = serving_client()
    client.wait(31)
    assert client.handle(make_invitation()) == [
        JoinTrace(RUN_TRACE),
        declines("recruiting for tiny-1 ended at 12:00:30"),
    ]


def test_an_invitation_waits_until_the_client_serves() -> None:
    client = starting_client()
    assert client.handle(make_invitation()) == []
    assert client.handle(infer_ready(1)) == [STOPS_APPLY, moves(ClientEvent.INFER_READY, 1), *starts_join()]


def test_an_invitation_that_waited_is_used_once() -> None:
    client = starting_client()
    client.handle(make_invitation(), infer_ready(1), SlotTaken())
    assert client.handle(fail_train())[-1] == ReadOpenRun()


def test_a_client_asks_for_an_open_run_when_it_serves() -> None:
    client = serving_client()
    assert client.handle(OpenRunRead(None)) == []
    assert client.handle(OpenRunRead(make_invitation())) == starts_join()


def test_a_run_ends_with_its_model_being_served() -> None:
    client = learning_client()
    assert client.handle(model_announced(2)) == []
    assert client.handle(fin_train()) == [
        *ENDS_RUN,
        MoveClient(ClientEvent.FIN_TRAIN, {"run": None, "model": model(1)}),
        fetches(2),
    ]
    assert client.handle(ModelFetched(model(2))) == [STARTS_APPLY, updates(2)]
    assert client.handle(infer_ready(2)) == [STOPS_APPLY, moves(ClientEvent.INFER_READY, 2), ReadOpenRun()]


def test_a_version_after_the_end_of_training_is_awaited() -> None:
    client = learning_client()
    assert client.handle(fin_train())[-1] == StartTimer(ClientTimer.VERSION, APPLY_S)
    assert client.handle(model_announced(2)) == [CancelTimer(ClientTimer.VERSION), fetches(2)]


def test_a_repeated_answer_does_not_end_the_wait_for_a_version() -> None:
    client = learning_client()
    client.handle(fin_train())
    assert client.handle(infer_ready(1)) == ignored("infer_ready", ClientState.PENDING_APPLICATION)
    refusal = infer_refused(1, serving=1)
    assert client.handle(refusal) == ignored("infer_refused", ClientState.PENDING_APPLICATION)


def test_a_version_is_awaited_within_a_limit() -> None:
    client = learning_client()
    client.handle(fin_train())
    reason = f"the run published no model version in time (limit {APPLY_S:g} s)"
    assert client.handle(fired(ClientTimer.VERSION)) == [
        STOPS_APPLY,
        moves(ClientEvent.NO_NEW_MODEL, 1, reason),
        ReadOpenRun(),
    ]


def test_a_result_that_is_not_promoted_is_not_awaited() -> None:
    client = learning_client()
    assert client.handle(fin_train(new_model=False)) == [
        *ENDS_RUN,
        MoveClient(ClientEvent.FIN_TRAIN, {"run": None, "model": model(1)}),
        STOPS_APPLY,
        moves(ClientEvent.NO_NEW_MODEL, 1, "the result of the run is not promoted"),
        ReadOpenRun(),
    ]


@pytest.mark.parametrize(
    ("event", "move", "reason"),
    [
        (fail_train(), ClientEvent.FAIL_TRAIN, "it broke"),
        (fail_train(lost=True), ClientEvent.TRAINER_LOST, "it broke"),
        (
            fired(ClientTimer.LEARN),
            ClientEvent.DEADLINE,
            f"the run did not end in time (limit {LEARN_S:g} s)",
        ),
    ],
    ids=["failed", "lost", "deadline"],
)
def test_a_failed_training_leaves_the_client_serving(event: Event, move: ClientEvent, reason: str) -> None:
    client = learning_client()
    assert client.handle(event) == [
        *ENDS_RUN,
        MoveClient(move, {"run": None, "model": model(1)}, reason),
        ReadOpenRun(),
    ]
    assert client.state is ClientState.SERVING


def test_a_client_that_failed_twice_in_a_run_stays_out_of_it() -> None:
    client = learning_client()
    client.handle(fail_train())
    assert client.handle(OpenRunRead(make_invitation())) == starts_join()
    client.handle(SlotTaken(), fail_train())
    assert client.handle(OpenRunRead(make_invitation())) == [
        JoinTrace(RUN_TRACE),
        declines("this client has failed 2 times in tiny-1"),
    ]
    assert client.handle(make_invitation("tiny-2")) == starts_join("tiny-2")


@pytest.mark.parametrize("message", [fin_train("tiny-7"), fail_train("tiny-7")])
def test_a_message_about_another_run_is_ignored(message: FinTrain | FailTrain) -> None:
    assert learning_client().handle(message) == ignored(message.name, ClientState.LEARNING)
    assert serving_client().handle(message) == ignored(message.name, ClientState.SERVING)


# --- eligibility and slots --------------------------------------------------------------------------

RULED = {"eligibility": {"rule": "labelled >= 3", "again-s": 5}, "capture": {"holdout-share": 0.25}}


def test_a_rule_is_tried_with_the_facts_that_it_names() -> None:
    client = serving_client(table=RULED)
    reads = ReadDeviceFacts(frozenset({"labelled"}), model(1), 0.25)
    assert client.handle(make_invitation()) == [JoinTrace(RUN_TRACE), reads]
    assert client.handle(DeviceFactsRead({"labelled": 12.0})) == [TakeSlot(RUN)]
    assert client.handle(SlotTaken()) == JOINS


def test_an_ineligible_client_declines_once_and_looks_again() -> None:
    client = serving_client(table=RULED)
    client.handle(make_invitation())
    again = StartTimer(ClientTimer.ELIGIBLE, 5)
    reason = "labelled is 0, and should be at least 3"
    assert client.handle(DeviceFactsRead({"labelled": 0.0})) == [
        again,
        declines(reason, rule="labelled >= 3", facts={"labelled": 0.0}),
    ]
    assert client.handle(fired(ClientTimer.ELIGIBLE)) == [ReadOpenRun()]
    client.handle(OpenRunRead(make_invitation()))
    assert client.handle(DeviceFactsRead({"labelled": 2.0})) == [again], "only the number is another"
    client.handle(fired(ClientTimer.ELIGIBLE), OpenRunRead(make_invitation()))
    assert client.handle(DeviceFactsRead({"labelled": 3.0})) == [TakeSlot(RUN)]


def test_a_rule_is_declined_again_for_another_run() -> None:
    client = serving_client(table=RULED)
    client.handle(make_invitation(), DeviceFactsRead({"labelled": 0.0}), make_invitation("tiny-2"))
    assert declines(
        "labelled is 0, and should be at least 3",
        "tiny-2",
        rule="labelled >= 3",
        facts={"labelled": 0.0},
    ) in client.handle(DeviceFactsRead({"labelled": 0.0}))


def test_a_client_without_a_slot_declines_and_looks_again() -> None:
    client = serving_client()
    client.handle(make_invitation())
    reason = "this device already trains fashion-1 (limit 1 at a time)"
    again = StartTimer(ClientTimer.ELIGIBLE, SLOT_AGAIN_S)
    assert client.handle(SlotsBusy(("fashion-1",), 1)) == [again, declines(reason)]
    client.handle(fired(ClientTimer.ELIGIBLE), OpenRunRead(make_invitation()))
    assert client.handle(SlotsBusy(("fashion-1",), 1)) == [again]
    client.handle(fired(ClientTimer.ELIGIBLE), OpenRunRead(make_invitation()))
    assert client.handle(SlotTaken()) == JOINS
