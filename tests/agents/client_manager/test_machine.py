"""The decisions of the client manager: each test hands in events and compares the whole list of effects."""

from datetime import timedelta

import pytest
from support.client_machine import (
    CLIENT_ID,
    LABELS,
    LEARN_S,
    RUN_TRACE,
    ClientDriver,
    applying_client,
    infer_ready,
    infer_refused,
    learning_client,
    make_invitation,
    model_announced,
    model_rolled_back,
    new_client,
    server_info,
    serving_client,
    starting_client,
)
from support.server_machine import NAME, NEW, NOW, OLD, PLAN, RUN, model, task_at

from fedbus.agents.client_manager.effects import (
    EnrollClient,
    Fail,
    FetchModel,
    HandOverModel,
    JoinTrace,
    MoveClient,
    OpenInbox,
    PrepareCode,
    ReadDeviceFacts,
    ReadOpenRun,
    ReadServerInfo,
    ReleaseSlot,
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
from fedbus.agents.client_manager.machine import APPLY_S, FETCH_ATTEMPTS, SLOT_AGAIN_S, SYNC_S
from fedbus.agents.common.machine import (
    CancelTimer,
    FinishStartup,
    Log,
    Publish,
    RetryLater,
    StartTimer,
    TimerFired,
)
from fedbus.contracts.client import (
    ClientDeclined,
    ClientEvent,
    ClientStart,
    ClientState,
    FailTrain,
    FinTrain,
)
from fedbus.contracts.code import CodePlan, CodePublished, CodeReady, CodeRefused, RolloutCohort

BEGINS_SEARCH = [ReadServerInfo(until_answered=True)]
STARTS_BOOTSTRAP = StartTimer(ClientTimer.BOOTSTRAP, 10.0)
STOPS_APPLY = CancelTimer(ClientTimer.APPLY)
STARTS_APPLY = StartTimer(ClientTimer.APPLY, APPLY_S)
STARTS_TRAINING = ClientStart(task=NAME, client=CLIENT_ID, run=RUN, plan=PLAN, code_version=OLD)
ENDS_RUN = [CancelTimer(ClientTimer.LEARN), ReleaseSlot()]
NO_ANSWER = f"the inference agent did not answer in time (limit {APPLY_S:g} s)"
JOINS = [
    MoveClient(ClientEvent.CLIENT_START, {"run": RUN}, deadline=NOW + timedelta(seconds=LEARN_S)),
    StartTimer(ClientTimer.LEARN, LEARN_S),
    Publish(STARTS_TRAINING),
]


def begins(run: str = RUN) -> list[object]:
    """The effects of a client that may join: it takes a slot."""
    return [JoinTrace(RUN_TRACE), TakeSlot(run)]


def declines(reason: str, run: str = RUN, **more: object) -> Publish:
    content = {"task": NAME, "client": CLIENT_ID, "run": run, "reason": reason, **more}
    return Publish(ClientDeclined.model_validate(content))


def fin_train(run: str = RUN, *, new_model: bool = True) -> FinTrain:
    return FinTrain(task=NAME, client=CLIENT_ID, run=run, new_model=new_model)


def fail_train(run: str = RUN, *, lost: bool = False) -> FailTrain:
    return FailTrain(task=NAME, client=CLIENT_ID, run=run, reason="it broke", trainer_lost=lost)


def fetches(version: int, attempts: int = FETCH_ATTEMPTS, term: int | None = None) -> FetchModel:
    return FetchModel(model_announced(version, term).announcement, attempts)


def fetches_first(version: int) -> FetchModel:
    return FetchModel(model_announced(version, traceparent="").announcement, attempts=1)


def updates(version: int, term: int | None = None, code: str = OLD) -> HandOverModel:
    """The model is handed to an inference agent that serves another one."""
    number = version if term is None else term
    return HandOverModel(model(version), code, term=number, published_in="00-model")


def starts(version: int, code: str = OLD) -> HandOverModel:
    """The model is handed to an inference agent that serves none."""
    return HandOverModel(model(version), code, is_first=True, term=version)


def moves(event: ClientEvent, version: int, reason: str = "", **more: str) -> MoveClient:
    return MoveClient(event, {"model": model(version), **more}, reason)  # type: ignore[typeddict-item]


def ignored(name: str, state: ClientState) -> list[Log]:
    return [Log("debug", "Ignoring message", {"message": name, "state": str(state)})]


def code_published(stable: str = OLD, candidate: str = "", **more: object) -> CodePublished:
    content = {"task": NAME, "code_version": stable, "candidate": candidate, **more}
    return CodePublished.model_validate(content)


def code_ready(version: str, attempt: int | None = 0) -> Publish:
    return Publish(CodeReady(task=NAME, client=CLIENT_ID, code_version=version, attempt=attempt))


def code_refused(version: str, reason: str, attempt: int | None = 0) -> list[Log | Publish]:
    refused = CodeRefused(
        task=NAME, client=CLIENT_ID, code_version=version, reason=reason, stays_on=OLD, attempt=attempt
    )
    return [Log("warning", "New code refused", {"code": version, "reason": reason}), Publish(refused)]


def begins_sync(version: str = NEW) -> list[object]:
    deadline = NOW + timedelta(seconds=SYNC_S)
    move = MoveClient(ClientEvent.CODE_PUBLISHED, reason=f"code {version[:12]}", deadline=deadline)
    return [move, PrepareCode(version, SYNC_S)]


def fired(timer: ClientTimer) -> TimerFired[ClientTimer]:
    return TimerFired(timer)


# --- the start ------------------------------------------------------------------------------------


def test_a_new_client_enrolls_before_it_subscribes() -> None:
    client = new_client()
    assert client.handle(ClientManagerStarted()) == [STARTS_BOOTSTRAP, EnrollClient()]
    assert client.handle(EnrollmentAnswered()) == [OpenInbox(), STARTS_BOOTSTRAP, *BEGINS_SEARCH]


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
        MoveClient(ClientEvent.RESTARTED, changes),  # type: ignore[arg-type]
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
    assert client.handle(fired(ClientTimer.MODEL)) == BEGINS_SEARCH
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
    assert client.handle(make_invitation()) == begins()
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
    assert client.handle(infer_ready(1)) == [STOPS_APPLY, moves(ClientEvent.INFER_READY, 1), *begins()]


def test_an_invitation_that_waited_is_used_once() -> None:
    client = starting_client()
    client.handle(make_invitation(), infer_ready(1), SlotTaken())
    assert client.handle(fail_train())[-1] == ReadOpenRun()


def test_a_client_asks_for_an_open_run_when_it_serves() -> None:
    client = serving_client()
    assert client.handle(OpenRunRead(None)) == []
    assert client.handle(OpenRunRead(make_invitation())) == begins()


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
    assert client.handle(OpenRunRead(make_invitation())) == begins()
    client.handle(SlotTaken(), fail_train())
    assert client.handle(OpenRunRead(make_invitation())) == [
        JoinTrace(RUN_TRACE),
        declines("this client has failed 2 times in tiny-1"),
    ]
    assert client.handle(make_invitation("tiny-2")) == begins("tiny-2")


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


# --- models ---------------------------------------------------------------------------------------


def test_an_announced_model_is_applied_while_the_old_one_serves() -> None:
    client = serving_client()
    assert client.handle(model_announced(2)) == [moves(ClientEvent.MODEL_PUBLISHED, 2), fetches(2)]
    assert client.handle(ModelFetched(model(2))) == [STARTS_APPLY, updates(2)]
    assert client.handle(infer_ready(2)) == [STOPS_APPLY, moves(ClientEvent.INFER_READY, 2), ReadOpenRun()]


@pytest.mark.parametrize("term", [0, 1, 7])
def test_the_served_version_is_not_applied_again(term: int) -> None:
    assert serving_client().handle(model_announced(1, term)) == []


def test_an_older_announcement_does_not_replace_a_newer_one() -> None:
    client = learning_client()
    client.handle(model_announced(3), model_announced(2))
    assert fetches(3) in client.handle(fin_train())


def test_a_lower_version_is_applied_where_its_term_is_higher() -> None:
    client = applying_client()
    client.handle(infer_ready(2))
    assert client.handle(model_announced(1, 3)) == [moves(ClientEvent.MODEL_PUBLISHED, 1), fetches(1, term=3)]


def test_a_model_announced_while_another_is_applied_comes_next() -> None:
    client = applying_client()
    assert client.handle(model_announced(3)) == []
    assert client.handle(infer_ready(2)) == [
        STOPS_APPLY,
        moves(ClientEvent.INFER_READY, 2),
        moves(ClientEvent.MODEL_PUBLISHED, 3),
        fetches(3),
    ]


def test_a_term_that_changes_during_the_download_is_handed_over() -> None:
    client = serving_client()
    client.handle(model_announced(2, 4), model_announced(2, 5))
    assert client.handle(ModelFetched(model(2))) == [STARTS_APPLY, updates(2, 5)]


def test_an_answer_before_the_hand_over_is_ignored() -> None:
    client = serving_client()
    client.handle(model_announced(2))
    assert client.handle(infer_ready(2)) == ignored("infer_ready", ClientState.PENDING_APPLICATION)


def test_an_answer_about_an_older_model_is_ignored() -> None:
    client = applying_client()
    assert client.handle(infer_ready(1)) == ignored("infer_ready", ClientState.PENDING_APPLICATION)


@pytest.mark.parametrize(
    ("event", "reason"),
    [(infer_refused(2, serving=1), "NaN"), (fired(ClientTimer.APPLY), NO_ANSWER)],
    ids=["refused", "no answer"],
)
def test_a_refused_model_leaves_the_old_one_serving(event: Event, reason: str) -> None:
    client = applying_client()
    effects = client.handle(event)
    assert [one for one in effects if not isinstance(one, Log)] == [
        STOPS_APPLY,
        moves(ClientEvent.INFER_REFUSED, 1, reason),
        ReadOpenRun(),
    ]
    assert client.handle(model_announced(3)) == [moves(ClientEvent.MODEL_PUBLISHED, 3), fetches(3)]


def test_a_refusal_is_logged() -> None:
    data = {"version": "2", "reason": "NaN"}
    assert applying_client().handle(infer_refused(2, serving=1))[0] == Log(
        "warning", "Inference agent refused the model", data
    )


def test_an_unavailable_model_leaves_the_old_one_serving() -> None:
    client = serving_client()
    client.handle(model_announced(2))
    assert client.handle(ModelNotFetched(model(2), "it is not signed")) == [
        STOPS_APPLY,
        moves(ClientEvent.INFER_REFUSED, 1, "it is not signed"),
        ReadOpenRun(),
    ]


def test_a_restarted_client_learns_from_a_refusal_what_is_served() -> None:
    client = new_client()
    client.handle(ClientManagerStarted(), EnrollmentAnswered(), server_info(2), ModelFetched(model(2)))
    effects = client.handle(infer_refused(2, serving=1, still=model(1)))
    assert moves(ClientEvent.INFER_REFUSED, 1, "NaN") in effects


def test_a_refused_first_model_is_searched_until_one_is_accepted() -> None:
    client = starting_client()
    refused = infer_refused(1, serving=None)
    for attempt in (0, 1):
        assert client.handle(refused)[1:] == [
            STOPS_APPLY,
            moves(ClientEvent.INFER_RETRIED, 1, "NaN"),
            RetryLater(ClientTimer.REFUSED, attempt),
        ]
        assert client.handle(refused) == ignored("infer_refused", ClientState.PENDING_APPLICATION)
        assert client.handle(fired(ClientTimer.REFUSED)) == BEGINS_SEARCH
        assert client.handle(server_info(1)) == [fetches_first(1)]
        assert client.handle(ModelFetched(model(1))) == [starts(1)]
    assert client.handle(infer_ready(1))[1] == moves(ClientEvent.INFER_READY, 1)


def test_code_that_is_changed_in_a_search_is_recorded() -> None:
    client = starting_client()
    client.handle(infer_refused(1, serving=None), fired(ClientTimer.REFUSED))
    client.handle(server_info(1, code=CodePlan(code_version=NEW)), CodePrepared(task_at(NEW)))
    assert client.handle(ModelFetched(model(1))) == [starts(1, NEW)]
    assert client.handle(infer_ready(1, NEW))[1] == moves(ClientEvent.INFER_READY, 1, code_version=NEW)
    assert client.data.code_version == NEW


def test_an_inference_agent_without_a_model_has_no_deadline() -> None:
    client = applying_client()
    client.handle(infer_refused(2, serving=None))
    assert client.state is ClientState.PENDING_APPLICATION
    assert client.handle(fired(ClientTimer.APPLY)) == []


def test_a_rolled_back_model_is_recorded_and_not_applied_again() -> None:
    client = applying_client()
    client.handle(infer_ready(2))
    back = model_rolled_back(2, to=1)
    assert client.handle(back) == [moves(ClientEvent.MODEL_RETURNED, 1, "it errs")]
    assert client.handle(back) == ignored("model_returned", ClientState.SERVING)
    assert client.handle(model_announced(3)) == [moves(ClientEvent.MODEL_PUBLISHED, 3), fetches(3)]


def test_a_rolled_back_model_is_applied_when_promoted_again() -> None:
    client = applying_client()
    client.handle(infer_ready(2), model_rolled_back(2, to=1))
    assert client.handle(model_announced(2, 5)) == [
        moves(ClientEvent.MODEL_PUBLISHED, 2),
        fetches(2, term=5),
    ]


def test_a_roll_back_during_a_run_is_recorded_at_its_end() -> None:
    client = applying_client()
    client.handle(infer_ready(2), make_invitation(), SlotTaken())
    assert client.handle(model_rolled_back(2, to=1)) == []
    assert MoveClient(ClientEvent.FAIL_TRAIN, {"run": None, "model": model(1)}, "it broke") in (
        client.handle(fail_train())
    )


def test_a_roll_back_during_an_application_does_not_stop_it() -> None:
    client = applying_client()
    client.handle(infer_ready(2), model_announced(3), ModelFetched(model(3)))
    assert client.handle(model_rolled_back(2, to=1)) == []
    assert client.handle(fired(ClientTimer.APPLY))[1] == moves(ClientEvent.INFER_REFUSED, 1, NO_ANSWER)


def test_a_model_accepted_after_a_roll_back_is_recorded() -> None:
    client = applying_client()
    client.handle(infer_ready(2), model_announced(3), ModelFetched(model(3)), model_rolled_back(2, to=1))
    assert client.handle(infer_ready(3))[1] == moves(ClientEvent.INFER_READY, 3)


# --- code -----------------------------------------------------------------------------------------


def syncing_client() -> ClientDriver:
    """A client that has prepared new code and waits for the inference agent."""
    client = serving_client()
    client.handle(code_published(OLD, NEW), CodePrepared(task_at(NEW)))
    client.effects.clear()
    return client


def test_new_code_is_prepared_tried_and_then_used() -> None:
    client, new = serving_client(), task_at(NEW)
    assert client.handle(code_published(OLD, NEW)) == begins_sync()
    assert client.handle(CodePrepared(new)) == [
        STARTS_APPLY,
        HandOverModel(model(1), NEW, term=1),
    ]
    assert client.handle(infer_ready(1, NEW)) == [
        STOPS_APPLY,
        SwitchCode(new),
        code_ready(NEW),
        ReadServerInfo(),
    ]
    assert client.handle(server_info(1)) == [
        STOPS_APPLY,
        moves(ClientEvent.CODE_READY, 1, code_version=NEW),
        ReadOpenRun(),
    ]
    assert client.machine.task == new


def test_own_code_needs_no_change() -> None:
    assert serving_client().handle(code_published(OLD)) == [ReadOpenRun()]


@pytest.mark.parametrize(
    ("event", "reason"),
    [(infer_refused(1, serving=1, code_version=NEW), "NaN"), (fired(ClientTimer.APPLY), NO_ANSWER)],
    ids=["refused", "no answer"],
)
def test_code_that_the_inference_agent_cannot_use_is_refused(event: Event, reason: str) -> None:
    assert syncing_client().handle(event) == [
        STOPS_APPLY,
        moves(ClientEvent.CODE_REFUSED, 1, f"code bbbbbbbbbbbb: {reason}"),
        *code_refused(NEW, reason),
        ReadOpenRun(),
    ]


def test_code_that_cannot_be_prepared_is_refused() -> None:
    client = serving_client()
    client.handle(code_published(OLD, NEW))
    assert client.handle(CodeNotPrepared(NEW, "not signed")) == [
        STOPS_APPLY,
        moves(ClientEvent.CODE_REFUSED, 1, "code bbbbbbbbbbbb: not signed"),
        *code_refused(NEW, "not signed"),
        ReadOpenRun(),
    ]


def test_an_answer_without_the_new_code_is_not_one_about_it() -> None:
    client = syncing_client()
    assert client.handle(infer_ready(1)) == ignored("infer_ready", ClientState.SYNCING)


def test_refused_code_is_not_tried_again_in_its_rollout() -> None:
    client = syncing_client()
    client.handle(infer_refused(1, serving=1, code_version=NEW))
    assert client.handle(code_published(OLD, NEW)) == [*code_refused(NEW, "NaN"), ReadOpenRun()]


def test_refused_code_is_tried_in_another_rollout() -> None:
    client = syncing_client()
    client.handle(infer_refused(1, serving=1, code_version=NEW))
    assert client.handle(code_published(OLD, NEW, attempt=1)) == begins_sync()


def test_a_client_with_the_candidate_answers_again() -> None:
    client = syncing_client()
    client.handle(infer_ready(1, NEW), server_info(1))
    assert client.handle(code_published(OLD, NEW)) == [code_ready(NEW), ReadOpenRun()]


def test_a_client_outside_the_cohort_keeps_its_code() -> None:
    client = serving_client()
    cohort = RolloutCohort(labels={"site": "garden"}).model_dump()
    assert client.handle(code_published(OLD, NEW, cohort=cohort)) == [ReadOpenRun()]


def test_a_label_makes_a_client_one_of_the_cohort() -> None:
    client = serving_client()
    cohort = RolloutCohort(labels=LABELS).model_dump()
    assert client.handle(code_published(OLD, NEW, cohort=cohort)) == begins_sync()


def test_code_waits_for_the_end_of_a_run() -> None:
    client = learning_client()
    assert client.handle(code_published(OLD, NEW)) == []
    assert client.handle(fin_train(new_model=False))[-2:] == begins_sync()


def test_code_goes_before_a_model_and_a_model_before_a_run() -> None:
    client = applying_client()
    client.handle(model_announced(3), code_published(OLD, NEW), make_invitation())
    assert client.handle(infer_ready(2))[2:] == begins_sync()
    client.handle(CodePrepared(task_at(NEW)), infer_ready(2, NEW))
    assert client.handle(ServerInfoRead(None, "it does not answer"))[2:] == [
        moves(ClientEvent.MODEL_PUBLISHED, 3),
        fetches(3),
    ]
    client.handle(ModelFetched(model(3)))
    assert client.handle(infer_ready(3))[2] == JoinTrace(RUN_TRACE)


def test_code_of_a_new_lineage_is_not_tried_with_the_old_model() -> None:
    client, new = serving_client(), task_at(NEW)
    client.handle(code_published(OLD, NEW, new_lineage=True))
    assert client.handle(CodePrepared(new)) == [
        STOPS_APPLY,
        SwitchCode(new),
        code_ready(NEW),
        ReadServerInfo(),
    ]


def test_a_model_that_the_old_code_refused_is_tried_with_the_new() -> None:
    client = applying_client()
    client.handle(infer_refused(2, serving=1))
    client.handle(code_published(OLD, NEW), CodePrepared(task_at(NEW)), infer_ready(1, NEW))
    announcement = model_announced(2, traceparent="").announcement
    assert client.handle(server_info(2))[2:] == [
        moves(ClientEvent.MODEL_PUBLISHED, 2),
        FetchModel(announcement, FETCH_ATTEMPTS),
    ]


def test_a_reverted_rollout_takes_the_device_back() -> None:
    client = syncing_client()
    client.handle(infer_ready(1, NEW), server_info(1))
    assert client.handle(code_published(OLD)) == begins_sync(OLD)


def test_a_plan_that_changes_during_preparation_is_followed_next() -> None:
    client = syncing_client()
    assert client.handle(code_published(OLD)) == []
    client.handle(infer_ready(1, NEW))
    assert client.handle(server_info(1))[2:] == begins_sync(OLD)


def test_a_late_result_of_other_code_changes_nothing() -> None:
    client = serving_client()
    client.handle(code_published(OLD, NEW))
    assert client.handle(CodePrepared(task_at("c" * 40))) == []
    assert client.handle(CodeNotPrepared("c" * 40, "not signed")) == []


@pytest.mark.parametrize(
    "event",
    [
        SlotTaken(),
        SlotsBusy((), 1),
        DeviceFactsRead({}),
        server_info(2),
        ModelFetched(model(2)),
        ModelNotFetched(model(2), "no"),
        CodePrepared(task_at(NEW)),
        CodeNotPrepared(NEW, "no"),
        *(fired(timer) for timer in ClientTimer if timer is not ClientTimer.ELIGIBLE),
    ],
    ids=lambda event: getattr(event, "timer", type(event).__name__),
)
def test_a_result_that_nothing_waits_for_changes_nothing(event: Event) -> None:
    assert serving_client().handle(event) == []
