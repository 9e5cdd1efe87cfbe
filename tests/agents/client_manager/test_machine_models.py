"""The decisions of the client manager on announced, refused and rolled-back models."""

import pytest
from support.client_effects import (
    NO_ANSWER,
    STARTS_APPLY,
    STARTS_SEARCH,
    STOPS_APPLY,
    fail_train,
    fetches,
    fetches_first,
    fin_train,
    fired,
    ignored,
    moves,
    starts,
    updates,
)
from support.client_machine import (
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
from support.server_machine import NAME, NEW, model, task_at

from fedbus.agents.client_manager.effects import (
    HandOverModel,
    MoveClient,
    ReadOpenRun,
)
from fedbus.agents.client_manager.events import (
    ClientManagerStarted,
    ClientTimer,
    CodePrepared,
    EnrollmentAnswered,
    Event,
    ModelFetched,
    ModelNotFetched,
    OpenRunRead,
    SlotTaken,
)
from fedbus.agents.common.machine import (
    Log,
    RetryLater,
)
from fedbus.contracts.client import (
    ClientEvent,
    ClientState,
)
from fedbus.contracts.code import CodePlan, CodePublished

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


@pytest.mark.parametrize("failed", [ModelNotFetched(model(2), "no holder"), infer_refused(2, serving=1)])
def test_a_failed_model_does_not_drop_the_one_announced_since(failed: Event) -> None:
    client = serving_client()
    client.handle(model_announced(2))
    if not isinstance(failed, ModelNotFetched):
        client.handle(ModelFetched(model(2)))
    client.handle(model_announced(3))
    assert client.handle(failed)[-2:] == [moves(ClientEvent.MODEL_PUBLISHED, 3), fetches(3)]


def test_a_failed_model_is_not_tried_again_in_a_new_term() -> None:
    client = serving_client()
    client.handle(model_announced(2), model_announced(2, 3))
    assert client.handle(ModelNotFetched(model(2), "no holder"))[-1] == ReadOpenRun()


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
        assert client.handle(fired(ClientTimer.REFUSED)) == STARTS_SEARCH
        assert client.handle(server_info(1)) == [fetches_first(1)]
        assert client.handle(ModelFetched(model(1))) == [STARTS_APPLY, starts(1)]
    assert client.handle(infer_ready(1))[1] == moves(ClientEvent.INFER_READY, 1)


def test_an_inference_agent_that_does_not_answer_to_the_first_model_is_asked_again() -> None:
    client = starting_client()
    assert client.handle(fired(ClientTimer.APPLY)) == [
        STOPS_APPLY,
        moves(ClientEvent.INFER_RETRIED, 1, NO_ANSWER),
        RetryLater(ClientTimer.REFUSED, 0),
    ]
    client.handle(fired(ClientTimer.REFUSED), server_info(1))
    assert client.handle(ModelFetched(model(1))) == [STARTS_APPLY, starts(1)]
    assert client.handle(infer_ready(1))[1] == moves(ClientEvent.INFER_READY, 1)


def test_code_that_is_changed_in_a_search_is_recorded() -> None:
    client = starting_client()
    client.handle(infer_refused(1, serving=None), fired(ClientTimer.REFUSED))
    client.handle(server_info(1, code=CodePlan(code_version=NEW)), CodePrepared(task_at(NEW)))
    assert client.handle(ModelFetched(model(1))) == [STARTS_APPLY, starts(1, NEW)]
    assert client.handle(infer_ready(1, NEW))[1] == moves(ClientEvent.INFER_READY, 1, code_version=NEW)
    assert client.data.code_version == NEW


def test_a_model_that_no_code_serves_is_taken() -> None:
    client = starting_client()
    reason = "version 1 is not served: NaN"
    assert client.handle(infer_refused(1, serving=None, not_served=True))[1:] == [
        STOPS_APPLY,
        moves(ClientEvent.MODEL_NOT_SERVED, 1, reason, not_served=reason),
        ReadOpenRun(),
    ]
    assert client.state is ClientState.SERVING
    assert client.handle(model_announced(2)) == [moves(ClientEvent.MODEL_PUBLISHED, 2), fetches(2)]
    client.handle(ModelFetched(model(2)))
    assert client.handle(infer_ready(2))[1] == moves(ClientEvent.INFER_READY, 2, not_served="")


def test_a_served_model_stays_served_behind_one_that_is_not() -> None:
    client = applying_client()
    client.handle(infer_refused(2, serving=1, still=model(1), not_served=True))
    assert client.data.model == model(2)
    assert client.handle(model_rolled_back(1, to=3))[0] == moves(
        ClientEvent.MODEL_RETURNED, 3, "it errs", not_served=""
    )


def test_new_code_may_serve_a_model_that_was_not_served() -> None:
    client = starting_client()
    client.handle(infer_refused(1, serving=None, not_served=True), OpenRunRead(None))
    client.handle(CodePublished(task=NAME, code_version=NEW))
    client.handle(CodePrepared(task_at(NEW)))
    effects = client.handle(server_info(1, code=CodePlan(code_version=NEW)))
    assert effects[-2] == moves(ClientEvent.MODEL_PUBLISHED, 1)
    handed = client.handle(ModelFetched(model(1)))[-1]
    assert isinstance(handed, HandOverModel)
    assert (handed.model, handed.code_version) == (model(1), NEW)


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
