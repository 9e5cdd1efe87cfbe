"""The decisions of the client manager on new code versions."""

import pytest
from support.client_effects import (
    NO_ANSWER,
    STARTS_APPLY,
    STOPS_APPLY,
    code_published,
    code_ready,
    code_refused,
    fetches,
    fin_train,
    fired,
    ignored,
    moves,
    starts_sync,
)
from support.client_machine import (
    LABELS,
    RUN_TRACE,
    ClientDriver,
    applying_client,
    infer_ready,
    infer_refused,
    learning_client,
    make_invitation,
    model_announced,
    server_info,
    serving_client,
)
from support.server_machine import NEW, OLD, model, task_at

from fedbus.agents.client_manager.effects import (
    FetchModel,
    HandOverModel,
    JoinTrace,
    ReadOpenRun,
    ReadServerInfo,
    SwitchCode,
)
from fedbus.agents.client_manager.events import (
    ClientTimer,
    CodeNotPrepared,
    CodePrepared,
    DeviceFactsRead,
    Event,
    ModelFetched,
    ModelNotFetched,
    ServerInfoRead,
    SlotsBusy,
    SlotTaken,
)
from fedbus.agents.client_manager.machine import FETCH_ATTEMPTS
from fedbus.contracts.client import (
    ClientEvent,
    ClientState,
)
from fedbus.contracts.code import RolloutCohort

# --- code -----------------------------------------------------------------------------------------


def syncing_client() -> ClientDriver:
    """A client that has prepared new code and waits for the inference agent."""
    client = serving_client()
    client.handle(code_published(OLD, NEW), CodePrepared(task_at(NEW)))
    client.effects.clear()
    return client


def test_new_code_is_prepared_tried_and_then_used() -> None:
    client, new = serving_client(), task_at(NEW)
    assert client.handle(code_published(OLD, NEW)) == starts_sync()
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
    assert client.handle(code_published(OLD, NEW, attempt=1)) == starts_sync()


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
    assert client.handle(code_published(OLD, NEW, cohort=cohort)) == starts_sync()


def test_code_waits_for_the_end_of_a_run() -> None:
    client = learning_client()
    assert client.handle(code_published(OLD, NEW)) == []
    assert client.handle(fin_train(new_model=False))[-2:] == starts_sync()


def test_code_goes_before_a_model_and_a_model_before_a_run() -> None:
    client = applying_client()
    client.handle(model_announced(3), code_published(OLD, NEW), make_invitation())
    assert client.handle(infer_ready(2))[2:] == starts_sync()
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
    assert client.handle(code_published(OLD)) == starts_sync(OLD)


def test_a_plan_that_changes_during_preparation_is_followed_next() -> None:
    client = syncing_client()
    assert client.handle(code_published(OLD)) == []
    client.handle(infer_ready(1, NEW))
    assert client.handle(server_info(1))[2:] == starts_sync(OLD)


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
