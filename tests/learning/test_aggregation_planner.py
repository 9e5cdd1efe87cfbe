"""The decisions of the aggregation modes, without arrays, messages or a clock."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbus.contracts.task.aggregation import AggregationTable, StalenessFunction
from fedbus.learning.aggregation_planner import (
    AggregationPlanner,
    Drop,
    Merge,
    MergeRule,
    StalenessWeight,
    make_planner,
)

COHORT = ["a", "b", "c"]


def planner(mode: str, **values: Any) -> AggregationPlanner:
    table = {"mode": mode, **{key.replace("_", "-"): value for key, value in values.items()}}
    made = make_planner(AggregationTable.model_validate(table))
    assert made is not None
    return made


def send(plan: AggregationPlanner, *, now: float = 0, present: list[str] = COHORT) -> list[str] | None:
    """Return the clients that get a message now; None if it is time to aggregate."""
    return None if plan.is_complete(now, set(present)) else plan.select()


def deadline_of(plan: AggregationPlanner) -> float | None:
    return plan.deadline


def test_sync_needs_no_plan() -> None:
    assert make_planner(AggregationTable()) is None


# --- the weight -----------------------------------------------------------------------------------


@given(st.sampled_from(StalenessFunction), st.floats(0.1, 20), st.integers(0, 10), st.integers(0, 100))
def test_a_weight_falls_from_one_with_staleness(
    function: StalenessFunction, a: float, b: int, staleness: int
) -> None:
    weight = StalenessWeight(function, a, b)
    assert weight(0) == 1
    assert 0 < weight(staleness + 1) <= weight(staleness) <= 1


def test_the_default_weight_is_that_of_fedbuff() -> None:
    assert [StalenessWeight()(s) for s in (0, 1, 3, 8)] == pytest.approx([1, 1 / math.sqrt(2), 1 / 2, 1 / 3])


# --- deadline -------------------------------------------------------------------------------------


def test_a_round_ends_when_all_have_answered() -> None:
    plan = planner("deadline", deadline_s=10)
    plan.begin(1, COHORT, 0)
    assert send(plan) == COHORT
    for client in COHORT:
        assert send(plan) == []
        plan.record_update(client)
    assert send(plan, now=3) is None
    assert plan.report.staleness == {"a": 0, "b": 0, "c": 0}


def test_a_round_ends_at_the_deadline_with_enough_updates() -> None:
    plan = planner("deadline", deadline_s=10, min_updates=2)
    plan.begin(1, COHORT, 100)
    send(plan, now=100)
    plan.record_update("a")
    assert send(plan, now=120) == []
    assert deadline_of(plan) is None, "it waits for another update"
    plan.record_update("b")
    assert deadline_of(plan) == 110
    assert send(plan, now=109) == []
    assert send(plan, now=110) is None


def test_a_client_that_trains_is_not_sent_the_next_round() -> None:
    plan = planner("deadline", deadline_s=10)
    plan.begin(1, COHORT, 0)
    send(plan)
    plan.record_update("a")
    plan.record_update("b")
    assert send(plan, now=10) is None
    plan.begin(2, COHORT, 10)
    assert send(plan, now=10) == ["a", "b"]
    assert plan.judge("c") == Merge(1, 2**-0.5)
    plan.record_update("c")
    assert send(plan, now=11) == [], "it takes part again in the next round"
    assert (plan.report.updates, plan.report.late_merged) == (1, 1)


def test_a_dropped_update_counts_and_frees_its_client() -> None:
    plan = planner("deadline", deadline_s=10, late="drop")
    plan.begin(1, ["a"], 0)
    send(plan)
    plan.begin(2, ["a"], 10)
    assert send(plan, now=10) == [], "all clients still train"
    assert plan.judge("a") == Drop(1)
    plan.record_update("a")
    assert send(plan, now=12) == ["a"], "otherwise the round would have no update"
    assert (plan.report.updates, plan.report.late_dropped) == (0, 1)


def test_a_round_without_hope_ends() -> None:
    plan = planner("deadline", min_updates=3)
    plan.begin(1, COHORT, 0)
    send(plan)
    for client in COHORT:
        plan.record_failure(client)
    assert send(plan) is None


# --- buffered -------------------------------------------------------------------------------------


def test_a_client_that_answers_trains_again_at_once() -> None:
    plan = planner("buffered", buffer_size=3)
    plan.begin(7, COHORT, 0)
    assert send(plan) == COHORT
    plan.record_update("a")
    assert send(plan) == ["a"]
    plan.record_update("a")
    plan.record_update("b")
    # ``a`` has two updates in this aggregation, and is sent the next model
    assert plan.report.updates == 2 + 1


def test_an_aggregation_begins_after_k_updates() -> None:
    plan = planner("buffered", buffer_size=2)
    plan.begin(1, COHORT, 0)
    send(plan)
    plan.record_update("a")
    send(plan)
    plan.record_update("b")
    assert send(plan) is None
    plan.begin(2, COHORT, 0)
    assert send(plan) == ["b"], "on the newest model"
    assert plan.judge("a") == Merge(1, 2**-0.5)
    assert plan.judge("b") == Merge(0, 1.0)
    assert plan.judge("b").keeps_update  # type: ignore[union-attr]  # None would fail the test


def test_a_failed_client_waits_for_the_next_model() -> None:
    plan = planner("buffered", buffer_size=2)
    plan.begin(1, COHORT, 0)
    send(plan)
    plan.record_failure("a")
    assert send(plan) == []
    plan.record_update("b")
    assert send(plan) == ["b"]
    plan.record_update("b")
    assert send(plan) is None
    plan.begin(2, COHORT, 0)
    assert send(plan) == ["a", "b"]


def test_the_client_that_was_idle_longest_goes_first() -> None:
    plan = planner("buffered", buffer_size=1)
    plan.begin(1, ["a"], 0)
    assert send(plan) == ["a"]
    plan.record_update("a")
    for version, cohort, expected in ((2, ["a"], ["a"]), (3, ["a", "b"], ["b"]), (4, ["a", "b"], [])):
        plan.begin(version, cohort, 0)
        assert send(plan) == expected
    plan.record_update("b")
    plan.record_update("a")
    plan.begin(5, ["b", "a"], 0)
    assert send(plan) == ["a", "b"]


@settings(max_examples=25)
@given(st.data())
def test_never_more_clients_train_than_the_cohort_has(data: st.DataObject) -> None:
    """Whatever arrives: one training a client, at most the cohort, and staleness as counted."""
    mode = data.draw(st.sampled_from(["deadline", "buffered", "async"]))
    plan = planner(mode, buffer_size=data.draw(st.integers(1, 4)), deadline_s=5)
    clients = [f"c{number}" for number in range(6)]
    started: dict[str, int] = {}
    now = 0.0
    for version in range(1, 6):
        cohort = data.draw(st.lists(st.sampled_from(clients), min_size=1, max_size=6, unique=True))
        plan.begin(version, cohort, now)
        for _ in range(30):
            present = data.draw(st.lists(st.sampled_from(clients), unique=True, min_size=1))
            if plan.is_complete(now, set(present)):
                break
            for client in plan.select():
                assert client not in started
                assert client in cohort
                assert client in present
                started[client] = version
            if mode != "deadline":
                assert len(started) <= max(len(cohort), len(clients))
            now += 1
            if not started:
                continue
            client = data.draw(st.sampled_from(sorted(started)))
            verdict = plan.judge(client)
            assert verdict.staleness == version - started.pop(client)
            if data.draw(st.booleans()):
                plan.record_update(client)
            else:
                plan.record_failure(client)
        report = plan.report
        assert report.updates >= len(report.staleness)
        assert report.late_merged <= report.updates


# --- async ----------------------------------------------------------------------------------------


def test_async_mixes_each_update() -> None:
    plan = planner("async", alpha=0.8)
    plan.begin(1, COHORT, 0)
    assert send(plan) == COHORT
    assert plan.judge("a") == Merge(0, 0.8, MergeRule.MIX)
    plan.record_update("a")
    assert send(plan) is None
    plan.begin(2, COHORT, 0)
    assert send(plan) == ["a"]
    assert plan.judge("b") == Merge(1, 0.8 * 2**-0.5, MergeRule.MIX)


def test_too_old_updates_are_dropped() -> None:
    plan = planner("async", max_staleness=1)
    plan.begin(1, COHORT, 0)
    send(plan)
    for version in (2, 3):
        plan.record_update("a")
        plan.begin(version, COHORT, 0)
        send(plan)
    assert plan.judge("b") == Drop(2)
    plan.record_update("b")
    assert send(plan) == ["b"]
    assert plan.report.late_dropped == 1


def test_updates_of_another_training_are_dropped() -> None:
    plan = planner("buffered")
    plan.begin(1, COHORT, 0)
    send(plan)
    plan.restart()
    plan.begin(2, COHORT, 0)
    assert plan.judge("a") == Drop(1)
    plan.record_update("a")
    send(plan)
    assert plan.judge("a") == Merge(0, 1.0)
