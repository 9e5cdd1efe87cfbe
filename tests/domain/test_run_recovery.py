"""Whether a run is taken up again after its Flower server was lost, and from where."""

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.examples import FACTS
from fedbus.contracts.model import Artifact, ModelRef
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import ServerData
from fedbus.contracts.situations import ServerTraining, server_training
from fedbus.domain.run_recovery import GiveUp, Resume, decide_recovery

BEGUN = ModelRef(sha256="0" * 64, size_bytes=64, architecture="a" * 64, version=3)
KEPT = Artifact(sha256="1" * 64, size_bytes=64, architecture="a" * 64)

SERVER_DATA = next(one for one in FACTS if isinstance(one, ServerData))


def training(**more: Any) -> ServerTraining:
    fresh: dict[str, Any] = {
        "plan": RunPlan(),
        "model": BEGUN,
        "base": BEGUN,
        "round": 0,
        "checkpoint": None,
        "recoveries": 0,
    }
    return dataclasses.replace(server_training(SERVER_DATA), **fresh | more)


def test_it_goes_on_after_the_last_round_that_was_kept() -> None:
    assert decide_recovery(training(round=2, checkpoint=KEPT), "killed") == Resume(KEPT, first_round=3)


def test_a_run_that_has_kept_nothing_begins_again_from_the_model_it_began_with() -> None:
    assert decide_recovery(training(), "killed") == Resume(BEGUN, first_round=1)


def test_a_champion_promoted_during_the_run_is_not_what_it_begins_again_from() -> None:
    promoted = BEGUN.model_copy(update={"version": 4, "sha256": "2" * 64})
    assert decide_recovery(training(model=promoted), "killed") == Resume(BEGUN, first_round=1)


def test_enough_is_enough_and_says_what_happened_last() -> None:
    assert decide_recovery(training(recoveries=2), "killed") == GiveUp(
        "killed; not resumed after 2 recoveries (limit 2)"
    )


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10))
def test_a_run_recovers_as_often_as_its_plan_says_and_no_more(done: int, may: int, rounds: int) -> None:
    plan = RunPlan(max_recoveries=may)
    decision = decide_recovery(training(plan=plan, recoveries=done, round=rounds, checkpoint=KEPT), "killed")
    assert isinstance(decision, Resume) == (done < may)
    if isinstance(decision, Resume):
        assert decision.first_round == rounds + 1
