"""Contributions: laws of leave-one-out and of Shapley values, on sums of real Flower records."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord

from fedbus.learning.flower.contribution import ContributionEvaluator, ContributionLimits, RoundUpdates

START = ArrayRecord({"w": Array(np.zeros(3, np.float32)), "n": Array(np.zeros((), np.int64))})


def update(value: float) -> dict[str, Any]:
    return {"w": np.full(3, value, np.float32), "n": np.array(4, np.int64)}


def score_nearness_to_one(_: int, arrays: ArrayRecord) -> MetricRecord:
    """Return a loss that is zero for a model of ones."""
    assert arrays["n"].numpy().dtype == np.int64
    return MetricRecord({"loss": float(np.abs(arrays["w"].numpy() - 1.0).sum())})


@pytest.fixture
def updates(tmp_path: Path) -> RoundUpdates:
    """Three players, which help, do nothing and do harm, and a fourth client that is not measured."""
    updates = RoundUpdates(tmp_path, ["good", "idle", "harmful"], start=START)
    for client, value, weight in (
        ("good", 1.0, 10),
        ("idle", 0.0, 10),
        ("harmful", -1.0, 10),
        ("other", 0.5, 5),
    ):
        updates.add(client, update(value), weight)
    return updates


@pytest.mark.parametrize(
    "limits",
    [ContributionLimits(every=1), ContributionLimits(every=1, permutations=20)],
    ids=["leave-one-out", "shapley"],
)
def test_a_helpful_update_is_worth_more_than_a_harmful_one(
    updates: RoundUpdates, limits: ContributionLimits
) -> None:
    worth = ContributionEvaluator(limits).evaluate_updates(updates, score_nearness_to_one, 1)
    assert worth["good"] > worth["idle"] > worth["harmful"]
    assert worth["good"] > 0 > worth["harmful"]
    assert worth.keys() == {"good", "idle", "harmful"}, "only players are measured"


def test_leave_one_out_compares_with_the_mean_of_the_others(updates: RoundUpdates) -> None:
    worth = ContributionEvaluator(ContributionLimits(every=1)).evaluate_updates(
        updates, score_nearness_to_one, 1
    )
    mean_of_all, mean_without = (10 - 10 + 2.5) / 35, (-10 + 2.5) / 25
    assert worth["good"] == pytest.approx(3 * ((1 - mean_without) - (1 - mean_of_all)), rel=1e-4)


def test_shapley_values_are_efficient(updates: RoundUpdates) -> None:
    """Efficiency: they add up to v(all) - v(clients that are not players), in each order and on average."""
    worth = ContributionEvaluator(ContributionLimits(every=1, permutations=30)).evaluate_updates(
        updates, score_nearness_to_one, 1
    )
    mean_of_all, mean_of_others = 2.5 / 35, 0.5
    assert math.fsum(worth.values()) == pytest.approx(3 * (mean_of_all - mean_of_others), rel=1e-3, abs=3e-2)


def test_a_single_client_is_compared_with_the_start_model(tmp_path: Path) -> None:
    updates = RoundUpdates(tmp_path, ["c1"], start=START)
    updates.add("c1", update(0.5), 7)
    for limits in (ContributionLimits(every=1), ContributionLimits(every=1, permutations=3)):
        assert ContributionEvaluator(limits).evaluate_updates(
            updates, score_nearness_to_one, 1
        ) == pytest.approx({"c1": 1.5})


def test_the_cost_is_bounded_by_clients_and_by_time(updates: RoundUpdates) -> None:
    evaluated_rounds = []

    def counting(number: int, arrays: ArrayRecord) -> MetricRecord:
        evaluated_rounds.append(number)
        return score_nearness_to_one(number, arrays)

    ContributionEvaluator(ContributionLimits(every=1)).evaluate_updates(updates, counting, 7)
    assert evaluated_rounds == [7] * 4, "once for all clients, once for each player"
    assert (
        ContributionEvaluator(ContributionLimits(every=1, seconds=1e-9)).evaluate_updates(
            updates, counting, 7
        )
        == {}
    )


def test_the_clients_not_measured_for_longest_are_players(updates: RoundUpdates) -> None:
    contributions = ContributionEvaluator(ContributionLimits(every=2, clients=2))
    assert [number for number in range(1, 7) if contributions.is_due(number)] == [2, 4, 6]
    assert contributions.select_players(["c3", "c1", "c2"]) == ["c1", "c2"]
    contributions.evaluate_updates(updates, score_nearness_to_one, 2)
    assert contributions.select_players(["good", "idle", "new"]) == ["new", "good"]


def test_without_a_metric_there_are_no_contributions(updates: RoundUpdates) -> None:
    for metrics in (None, MetricRecord({"other": 1.0}), MetricRecord({"loss": math.nan})):
        assert (
            ContributionEvaluator(ContributionLimits(every=1)).evaluate_updates(
                updates, partial(return_metrics, metrics), 1
            )
            == {}
        )


def return_metrics(metrics: MetricRecord | None, _number: int, _arrays: ArrayRecord) -> MetricRecord | None:
    return metrics
