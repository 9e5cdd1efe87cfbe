"""Whether a run came to anything."""

import dataclasses
from typing import Any

from fedbus.contracts.examples import FACTS
from fedbus.contracts.run import RoundResult
from fedbus.contracts.server import ServerData
from fedbus.contracts.situations import ServerTraining, server_training
from fedbus.domain.run_outcome import no_update_reason

SERVER_DATA = next(one for one in FACTS if isinstance(one, ServerData))


def training(**more: Any) -> ServerTraining:
    nothing = {"round": 2, "trainings": 0, "failures": 0, "last": None}
    return dataclasses.replace(server_training(SERVER_DATA), **nothing | more)


def test_a_run_without_a_single_update_came_to_nothing_and_says_why() -> None:
    last = RoundResult(round=2, failures={"c2": "out of memory", "c1": "its update cannot be had"})
    assert no_update_reason(training(trainings=4, failures=4, last=last)) == (
        "no client's update is in any of the 2 rounds; "
        "in the last one c1: its update cannot be had; c2: out of memory"
    )


def test_one_update_is_enough() -> None:
    assert no_update_reason(training(trainings=4, failures=3)) == ""


def test_an_app_that_reports_no_rounds_is_believed() -> None:
    assert no_update_reason(training()) == ""
