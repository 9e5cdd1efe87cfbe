"""Statistics and scores of clients, computed from rounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.run import RoundResult
from fedbus.domain.client_scores import ClientStats, collect_client_stats, compute_scores

ROUNDS = [
    RoundResult(round=1, participants={"c1": 10, "c2": 20}, train_s={"c1": 1.0}, contributions={"c1": 0.5}),
    RoundResult(round=2, participants={"c1": 30}, failures={"c2": "killed"}, train_s={"c1": 3.0}),
    RoundResult(
        round=3, participants={"c1": 40}, failures={"c2": "late"}, contributions={"c1": 0.25, "c2": -0.3}
    ),
]
NAMES = st.sampled_from(["c1", "c2", "c3"])
SOME = st.lists(
    st.builds(
        RoundResult,
        round=st.integers(0, 9),
        participants=st.dictionaries(NAMES, st.integers(0, 99)),
        failures=st.dictionaries(NAMES, st.just("no")),
        contributions=st.dictionaries(NAMES, st.floats(-1, 1)),
    )
)


def test_statistics_are_computed_from_the_rounds() -> None:
    known = collect_client_stats(ROUNDS)
    assert known["c1"] == ClientStats(rounds=3, failed=0, samples=40, train_s=2.0, contribution=0.375)
    assert known["c2"] == ClientStats(rounds=1, failed=2, samples=20, contribution=-0.3, last_failure="late")
    assert known["c1"].reliability == pytest.approx(4 / 5)
    assert known["c2"].reliability == pytest.approx(2 / 5)


def test_scores_depend_on_the_criterion() -> None:
    known = collect_client_stats(ROUNDS)
    assert compute_scores(known, "data") == {"c1": 1.0, "c2": 0.5}
    assert compute_scores(known, "contribution") == {"c1": 1.0, "c2": 0.0}
    assert compute_scores(known, "reliability")["c1"] > compute_scores(known, "reliability")["c2"]


@given(SOME, st.sampled_from(["reliability", "data", "contribution"]))
def test_every_score_is_a_share(rounds: list[RoundResult], by: str) -> None:
    known = collect_client_stats(rounds)
    found = compute_scores(known, by)  # type: ignore[arg-type]  # Hypothesis draws a plain str
    assert found.keys() == known.keys()
    assert all(0 <= score <= 1 for score in found.values())
