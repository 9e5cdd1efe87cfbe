"""The promotion gate: metrics of both models, the tolerance, and invalid metrics."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.task.task import GateTable
from fedbus.domain.model_promotion import judge_candidate

GATE = GateTable.model_validate({"tolerance": 0.1})
OPEN = GateTable.model_validate({"enabled": False})

figures = st.floats(0.001, 1000)
tolerances = st.floats(0, 1)


def gate(tolerance: float, **more: object) -> GateTable:
    return GateTable.model_validate({"tolerance": tolerance, **more})


def test_the_reason_has_both_values_and_the_limit() -> None:
    verdict = judge_candidate(GATE, {"loss": 0.091}, {"loss": 0.080})
    assert not verdict.promote
    assert verdict.reason == "loss 0.091, champion 0.08: 13.7 % worse (limit 10 %)"


@given(figures, tolerances)
def test_an_equal_candidate_is_always_promoted(figure: float, tolerance: float) -> None:
    assert judge_candidate(gate(tolerance), {"loss": figure}, {"loss": figure}).promote
    assert judge_candidate(gate(tolerance), {"accuracy": figure}, {"accuracy": figure}).promote


@given(figures, figures, tolerances, tolerances)
def test_a_lenient_gate_passes_what_a_strict_one_passes(
    new: float, old: float, one: float, other: float
) -> None:
    strict, lenient = sorted((one, other))
    if judge_candidate(gate(strict), {"loss": new}, {"loss": old}).promote:
        assert judge_candidate(gate(lenient), {"loss": new}, {"loss": old}).promote


@given(figures, figures, tolerances)
def test_a_candidate_beyond_the_tolerance_is_not_promoted(new: float, old: float, tolerance: float) -> None:
    if judge_candidate(gate(tolerance), {"loss": new}, {"loss": old}).promote:
        assert new <= old * (1 + tolerance) * (1 + 1e-9)
    if judge_candidate(gate(tolerance), {"accuracy": new}, {"accuracy": old}).promote:
        assert new >= old * (1 - tolerance) * (1 - 1e-9)


@given(figures, figures, figures, tolerances)
def test_a_better_candidate_passes_where_a_worse_one_does(
    one: float, other: float, old: float, tolerance: float
) -> None:
    better, worse = sorted((one, other))
    if judge_candidate(gate(tolerance), {"loss": worse}, {"loss": old}).promote:
        assert judge_candidate(gate(tolerance), {"loss": better}, {"loss": old}).promote


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("table", [GATE, OPEN])
def test_a_metric_that_is_not_finite_is_never_promoted(figure: float, table: GateTable) -> None:
    assert not judge_candidate(table, {"loss": figure}, {"loss": 1.0}).promote
    assert not judge_candidate(table, {"loss": figure}, {}).promote


def test_the_servers_own_loss_is_compared_first() -> None:
    both = {"loss": 1.0, "eval_loss": 5.0, "accuracy": 0.1}
    assert judge_candidate(GATE, both, {"loss": 1.0, "eval_loss": 1.0, "accuracy": 0.9}).reason.startswith(
        "loss "
    )
    assert judge_candidate(GATE, both, {"eval_loss": 5.0, "accuracy": 0.9}).reason.startswith("eval_loss ")


def test_without_a_common_metric_a_candidate_is_promoted() -> None:
    verdict = judge_candidate(GATE, {"accuracy": 0.5}, {"loss": 1.0})
    assert verdict.promote
    assert verdict.reason == "no metric of the champion to compare with"


def test_a_candidate_without_the_gates_metric_is_not_promoted() -> None:
    verdict = judge_candidate(gate(0.1, metric="f1"), {"loss": 0.1}, {"f1": 0.5})
    assert not verdict.promote
    assert "the run reported no f1" in verdict.reason


def test_the_gate_declares_which_direction_is_better() -> None:
    assert not judge_candidate(gate(0.1, metric="score"), {"score": 1.0}, {"score": 2.0}).promote
    inverted = gate(0.1, metric="score", **{"higher-is-better": False})
    assert judge_candidate(inverted, {"score": 1.0}, {"score": 2.0}).promote


FAILURE = "no client could evaluate the model: c1: ValueError: no data"


def test_a_candidate_that_no_client_could_evaluate_is_refused() -> None:
    for champion in ({}, {"eval_loss": 1.0}, {"train_loss": 1.0}):
        verdict = judge_candidate(GATE, {"train_loss": 0.5}, champion, evaluation_failure=FAILURE)
        assert (verdict.promote, verdict.reason, verdict.was_compared) == (False, FAILURE, True)


def test_a_missing_metric_of_the_gate_has_the_failed_evaluation_as_cause() -> None:
    verdict = judge_candidate(gate(0.1, metric="eval_f1"), {}, {"eval_f1": 0.5}, evaluation_failure=FAILURE)
    assert verdict.reason == f"the run reported no eval_f1, which the gate compares: {FAILURE}"


@pytest.mark.parametrize("table", [OPEN, gate(0.1, metric="train_loss")])
def test_a_gate_that_needs_no_evaluation_ignores_its_failure(table: GateTable) -> None:
    assert judge_candidate(
        table, {"train_loss": 0.5}, {"train_loss": 0.5}, evaluation_failure=FAILURE
    ).promote


def test_the_evaluation_of_the_server_replaces_that_of_the_clients() -> None:
    """For example ``loss``, or a metric with a name of the app's own, if the champion has none."""
    assert judge_candidate(GATE, {"loss": 0.5}, {"loss": 0.5}, evaluation_failure=FAILURE).promote
    assert judge_candidate(GATE, {"rmse": 0.5}, {}, evaluation_failure=FAILURE).promote


def test_a_candidate_without_an_evaluation_to_do_is_promoted() -> None:
    assert judge_candidate(GATE, {"train_loss": 0.5}, {"eval_loss": 1.0}).promote
