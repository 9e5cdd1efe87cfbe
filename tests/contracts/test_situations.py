"""Situations: each state has one, and incomplete data are an error."""

from typing import Any

import pytest

from fedbus.contracts.client import ClientData, ClientState, FlClientData, FlClientState
from fedbus.contracts.examples import ARTIFACT, FACTS, MODEL, NOON, PLAN, RESULT
from fedbus.contracts.scheduling import ScheduleData, ScheduleState
from fedbus.contracts.server import ServerData, ServerState
from fedbus.contracts.situations import (
    ClientApplying,
    ClientLearning,
    ClientServing,
    FlClientTraining,
    IncompleteData,
    ScheduleDue,
    ServerInitializing,
    ServerPublishing,
    ServerRecruiting,
    ServerTraining,
    ServerWaiting,
    client_situation,
    fl_client_situation,
    schedule_situation,
    server_situation,
)

SITUATION: dict[str, Any] = {
    "server": server_situation,
    "schedule": schedule_situation,
    "client": client_situation,
    "fl_client": fl_client_situation,
}
STATES: dict[str, Any] = {
    "server": ServerState,
    "schedule": ScheduleState,
    "client": ClientState,
    "fl_client": FlClientState,
}
SERVER = next(one for one in FACTS if isinstance(one, ServerData))


@pytest.mark.parametrize("kind", SITUATION)
def test_every_state_has_its_own_situation(kind: str) -> None:
    (data,) = [one for one in FACTS if one.kind == kind]
    found = [SITUATION[kind](state, data) for state in STATES[kind]]
    assert len(set(map(repr, found))) == len(found)


def test_a_run_in_training_has_plan_round_and_checkpoint() -> None:
    training = server_situation(ServerState.TRAINING, SERVER)
    assert isinstance(training, ServerTraining)
    assert (training.run, training.plan, training.round, training.last) == ("mnist-2", PLAN, 2, RESULT)
    assert training.latest == ARTIFACT
    fresh = server_situation(ServerState.TRAINING, SERVER.model_copy(update={"checkpoint": None}))
    assert isinstance(fresh, ServerTraining)
    assert fresh.latest == fresh.base == MODEL


@pytest.mark.parametrize("state", ServerState)
def test_a_server_is_in_the_situation_of_its_state(state: ServerState) -> None:
    expected = {
        ServerState.MODEL_INIT: ServerInitializing,
        ServerState.WAITING: ServerWaiting,
        ServerState.RECRUITING: ServerRecruiting,
        ServerState.TRAINING: ServerTraining,
        ServerState.PUBLISHING: ServerPublishing,
    }
    assert type(server_situation(state, SERVER)) is expected[state]


@pytest.mark.parametrize(
    ("state", "missing"),
    [
        (ServerState.WAITING, "model"),
        (ServerState.RECRUITING, "run"),
        (ServerState.RECRUITING, "plan"),
        (ServerState.TRAINING, "recruit_until"),
        (ServerState.PUBLISHING, "checkpoint"),
    ],
)
def test_incomplete_data_names_the_missing_field(state: ServerState, missing: str) -> None:
    with pytest.raises(
        IncompleteData, match=f"server mnist is in state {state}, but its last transition lacks {missing}"
    ):
        server_situation(state, SERVER.model_copy(update={missing: None}))


def test_a_due_schedule_has_the_time_it_became_due() -> None:
    data = ScheduleData(task="mnist", since=NOON, clock_since=NOON, due_since=NOON, cause="every 6h")
    assert schedule_situation(ScheduleState.DUE, data) == ScheduleDue(NOON, "every 6h", "")
    with pytest.raises(
        IncompleteData, match="schedule mnist is in state due, but its last transition lacks due_since"
    ):
        schedule_situation(ScheduleState.DUE, data.model_copy(update={"due_since": None}))


def test_a_learning_client_has_a_run_and_a_model() -> None:
    data = ClientData(task="mnist", client="c1", model=MODEL, run="mnist-2")
    assert client_situation(ClientState.LEARNING, data) == ClientLearning(MODEL, "mnist-2")
    assert client_situation(ClientState.PENDING_APPLICATION, data) == ClientApplying(MODEL)
    assert client_situation(ClientState.SERVING, data) == ClientServing(MODEL)
    with pytest.raises(
        IncompleteData, match=r"client c1\.mnist is in state learning, but its last transition lacks run"
    ):
        client_situation(ClientState.LEARNING, data.model_copy(update={"run": None}))


def test_a_training_has_a_run() -> None:
    data = FlClientData(task="mnist", client="c1", run="mnist-2")
    assert fl_client_situation(FlClientState.TRAINING, data) == FlClientTraining("mnist-2")
    with pytest.raises(
        IncompleteData, match=r"fl_client c1\.mnist is in state pending, but its last transition lacks run"
    ):
        fl_client_situation(FlClientState.PENDING, FlClientData(task="mnist", client="c1"))
