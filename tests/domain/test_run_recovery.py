"""Recovery of a run after its Flower server was lost."""

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

INITIAL = ModelRef(sha256="0" * 64, size_bytes=64, architecture="a" * 64, version=3)
CHECKPOINT = Artifact(sha256="1" * 64, size_bytes=64, architecture="a" * 64)

SERVER_DATA = next(one for one in FACTS if isinstance(one, ServerData))


def training(**more: Any) -> ServerTraining:
    fresh: dict[str, Any] = {
        "plan": RunPlan(),
        "model": INITIAL,
        "base": INITIAL,
        "round": 0,
        "checkpoint": None,
        "recoveries": 0,
    }
    return dataclasses.replace(server_training(SERVER_DATA), **fresh | more)


def test_a_run_resumes_after_its_last_checkpoint() -> None:
    assert decide_recovery(training(round=2, checkpoint=CHECKPOINT), "killed") == Resume(
        CHECKPOINT, first_round=3
    )


def test_a_run_without_checkpoint_restarts_from_its_first_model() -> None:
    assert decide_recovery(training(), "killed") == Resume(INITIAL, first_round=1)


def test_a_run_does_not_restart_from_a_newer_champion() -> None:
    promoted = INITIAL.model_copy(update={"version": 4, "sha256": "2" * 64})
    assert decide_recovery(training(model=promoted), "killed") == Resume(INITIAL, first_round=1)


def test_a_run_gives_up_after_its_limit_with_the_last_reason() -> None:
    assert decide_recovery(training(recoveries=2), "killed") == GiveUp(
        "killed; not resumed after 2 recoveries (limit 2)"
    )


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10))
def test_a_run_recovers_as_often_as_its_plan_allows(done: int, may: int, rounds: int) -> None:
    plan = RunPlan(max_recoveries=may)
    decision = decide_recovery(
        training(plan=plan, recoveries=done, round=rounds, checkpoint=CHECKPOINT), "killed"
    )
    assert isinstance(decision, Resume) == (done < may)
    if isinstance(decision, Resume):
        assert decision.first_round == rounds + 1
