"""What an update was worth: laws of leaving one out and of Shapley values, on sums of real Flower records."""

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
    """The best model has ones."""
    assert arrays["n"].numpy().dtype == np.int64
    return MetricRecord({"loss": float(np.abs(arrays["w"].numpy() - 1.0).sum())})


@pytest.fixture
def updates(tmp_path: Path) -> RoundUpdates:
    """One client helps, one does nothing, one does harm; a fourth, which nobody looks at, helps a little."""
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
    "bounds",
    [ContributionLimits(every=1), ContributionLimits(every=1, permutations=20)],
    ids=["left out", "shapley"],
)
def test_who_helps_is_worth_more_than_who_harms(updates: RoundUpdates, bounds: ContributionLimits) -> None:
    worth = ContributionEvaluator(bounds).worth(updates, score_nearness_to_one, 1)
    assert worth["good"] > worth["idle"] > worth["harmful"]
    assert worth["good"] > 0 > worth["harmful"]
    assert worth.keys() == {"good", "idle", "harmful"}, "nobody else is looked at"


def test_left_out_is_what_the_mean_without_it_would_have_come_to(updates: RoundUpdates) -> None:
    worth = ContributionEvaluator(ContributionLimits(every=1)).worth(updates, score_nearness_to_one, 1)
    everybody, without = (10 - 10 + 2.5) / 35, (-10 + 2.5) / 25
    assert worth["good"] == pytest.approx(3 * ((1 - without) - (1 - everybody)), rel=1e-4)


def test_shapley_values_share_out_what_all_have_come_to(updates: RoundUpdates) -> None:
    """Efficiency: they add up to v(all) - v(those who are not looked at), in each order and so on average."""
    worth = ContributionEvaluator(ContributionLimits(every=1, permutations=30)).worth(
        updates, score_nearness_to_one, 1
    )
    everybody, others = 2.5 / 35, 0.5
    assert math.fsum(worth.values()) == pytest.approx(3 * (everybody - others), rel=1e-3, abs=3e-2)


def test_a_client_alone_is_measured_against_the_model_that_the_round_began_with(tmp_path: Path) -> None:
    alone = RoundUpdates(tmp_path, ["c1"], start=START)
    alone.add("c1", update(0.5), 7)
    for bounds in (ContributionLimits(every=1), ContributionLimits(every=1, permutations=3)):
        assert ContributionEvaluator(bounds).worth(alone, score_nearness_to_one, 1) == pytest.approx(
            {"c1": 1.5}
        )


def test_the_cost_is_bounded_by_clients_and_by_time(updates: RoundUpdates) -> None:
    asked = []

    def counting(number: int, arrays: ArrayRecord) -> MetricRecord:
        asked.append(number)
        return score_nearness_to_one(number, arrays)

    ContributionEvaluator(ContributionLimits(every=1)).worth(updates, counting, 7)
    assert asked == [7] * 4, "once for all, once for each that is looked at"
    assert ContributionEvaluator(ContributionLimits(every=1, seconds=1e-9)).worth(updates, counting, 7) == {}


def test_those_are_looked_at_first_that_were_not_for_longest(updates: RoundUpdates) -> None:
    contributions = ContributionEvaluator(ContributionLimits(every=2, clients=2))
    assert [number for number in range(1, 7) if contributions.looks_at(number)] == [2, 4, 6]
    assert contributions.players(["c3", "c1", "c2"]) == ["c1", "c2"]
    contributions.worth(updates, score_nearness_to_one, 2)
    assert contributions.players(["good", "idle", "new"]) == ["new", "good"]


def test_an_app_that_measures_nothing_leaves_it_open(updates: RoundUpdates) -> None:
    for nothing in (None, MetricRecord({"other": 1.0}), MetricRecord({"loss": math.nan})):
        assert (
            ContributionEvaluator(ContributionLimits(every=1)).worth(
                updates, partial(evaluate_nothing, nothing), 1
            )
            == {}
        )


def evaluate_nothing(metrics: MetricRecord | None, _number: int, _arrays: ArrayRecord) -> MetricRecord | None:
    return metrics
