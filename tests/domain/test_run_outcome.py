"""The outcome of a run, by the events of its server."""

import dataclasses
from typing import Any

import pytest

from fedbus.contracts.examples import FACTS
from fedbus.contracts.run import RUN, RoundResult
from fedbus.contracts.server import ServerData, ServerEvent
from fedbus.contracts.situations import ServerTraining, server_training
from fedbus.domain.run_outcome import RUN_EVENTS, no_update_reason, run_outcome

SERVER_DATA = next(one for one in FACTS if isinstance(one, ServerData))


def training(**more: Any) -> ServerTraining:
    nothing = {"round": 2, "trainings": 0, "failures": 0, "last": None}
    return dataclasses.replace(server_training(SERVER_DATA), **nothing | more)


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (ServerEvent.VERSION_PUBLISHED, "finished"),
        (ServerEvent.CANDIDATE_KEPT, "finished"),
        (ServerEvent.RUN_CANCELLED, "cancelled"),
        (ServerEvent.RECRUITING_EXPIRED, "failed"),
        (ServerEvent.RUN_FAILED, "failed"),
        (ServerEvent.VERSION_REFUSED, "failed"),
        (ServerEvent.RUN_FINISHED, None),
        (ServerEvent.ROUND_FINISHED, None),
        (ServerEvent.MODEL_PROMOTED, None),
    ],
)
def test_an_event_of_the_server_ends_a_run_with_one_outcome(event: ServerEvent, outcome: str | None) -> None:
    assert run_outcome(event) == outcome


def test_the_outcome_of_a_run_is_its_final_state() -> None:
    for event, run_event in RUN_EVENTS.items():
        targets = {target for (_, step), target in RUN.arrows.items() if step is run_event}
        assert len(targets) == 1
        assert (run_outcome(event) is not None) == (targets <= RUN.final)
        assert run_outcome(event) in {*targets, None}


def test_a_run_without_any_update_failed_with_a_reason() -> None:
    last = RoundResult(round=2, failures={"c2": "out of memory", "c1": "update unavailable"})
    assert no_update_reason(training(trainings=4, failures=4, last=last)) == (
        "no client's update is in any of the 2 rounds; "
        "in the last one c1: update unavailable; c2: out of memory"
    )


def test_a_run_without_updates_names_some_of_its_failed_clients() -> None:
    last = RoundResult(round=2, failures={f"c{number:05}": "no reply" for number in range(10_000)})
    reason = no_update_reason(training(trainings=4, failures=4, last=last))
    assert reason.endswith("c00018: no reply; c00019: no reply; 9980 more failed")
    assert len(reason) < 1000


def test_one_update_is_enough() -> None:
    assert no_update_reason(training(trainings=4, failures=3)) == ""


def test_an_app_that_reports_no_rounds_counts_as_successful() -> None:
    assert no_update_reason(training()) == ""
