"""Who is in a stage's cohort, and what becomes of a candidate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.code import CodeFacts, CodePlan, Cohort
from fedbus.contracts.task.task import RolloutTable
from fedbus.domain.code_rollout import (
    Trial,
    all_answered,
    code_for,
    cohort_of,
    covers,
    members,
    rank,
    refusal_of,
    verdict,
)

OLD, NEW = "a" * 40, "b" * 40
FLEET = {f"c{number}": {"site": "lab" if number % 4 else "ward"} for number in range(40)}
TABLE = RolloutTable.model_validate({"max-fail-rate": 0.25})

ids = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)
fleets = st.dictionaries(ids, st.just({"site": "lab"}), min_size=1, max_size=50)
percents = st.integers(1, 99).map(lambda share: f"{share}%")


@given(ids, ids)
def test_a_rank_is_always_the_same_and_between_nothing_and_one(client: str, version: str) -> None:
    assert rank(client, version) == rank(client, version)
    assert 0 <= rank(client, version) < 1


@given(fleets, percents)
def test_a_share_is_that_share_of_the_known_clients_rounded_up(
    fleet: dict[str, dict[str, str]], share: str
) -> None:
    there = members(cohort_of(share, fleet, NEW), fleet, NEW)
    assert len(there) == -(-len(fleet) * int(share[:-1]) // 100)


@given(fleets, percents, percents)
def test_a_larger_stage_holds_everybody_of_the_smaller(
    fleet: dict[str, dict[str, str]], one: str, other: str
) -> None:
    small, large = sorted((one, other), key=lambda share: int(share[:-1]))
    assert set(members(cohort_of(small, fleet, NEW), fleet, NEW)) <= set(
        members(cohort_of(large, fleet, NEW), fleet, NEW)
    )


def test_another_version_begins_with_other_clients() -> None:
    first = members(cohort_of("25%", FLEET, OLD), FLEET, OLD)
    second = members(cohort_of("25%", FLEET, NEW), FLEET, NEW)
    assert first != second


def test_the_last_stage_is_for_who_comes_later_too() -> None:
    assert covers(cohort_of("100%", FLEET, NEW), "a-new-one", {}, NEW)


def test_labels_choose_the_clients_that_have_them_all() -> None:
    cohort = cohort_of("site=ward,board=jetson", FLEET, NEW)
    assert covers(cohort, "c1", {"site": "ward", "board": "jetson", "floor": "2"}, NEW)
    assert not covers(cohort, "c1", {"site": "ward"}, NEW)


def test_who_is_not_in_the_cohort_stays_on_what_everybody_is_on() -> None:
    plan = CodePlan(code_version=OLD, candidate=NEW, cohort=Cohort(labels={"site": "ward"}))
    assert code_for(plan, "c1", {"site": "ward"}) == NEW
    assert code_for(plan, "c1", {"site": "lab"}) == OLD


def test_without_a_candidate_everybody_is_on_the_same() -> None:
    assert code_for(CodePlan(code_version=OLD), "c1", {}) == OLD


def test_a_stage_is_complete_when_everybody_has_said_yes_or_no_and_somebody_yes() -> None:
    facts = CodeFacts(task="mnist", candidate=NEW, clients=("c1", "c2"))
    assert all_answered(facts, frozenset({"c1"}), frozenset({"c2"}))
    assert not all_answered(facts, frozenset({"c1"}), frozenset())
    assert not all_answered(facts, frozenset(), frozenset({"c1", "c2"}))


def test_more_refusals_than_may_be_send_it_back_and_one_of_them_is_quoted() -> None:
    facts = CodeFacts(task="mnist", candidate=NEW, clients=("c1", "c2", "c3", "c4"))
    assert refusal_of(TABLE, facts, {"c1": "it is not signed"}) is None
    reason = refusal_of(TABLE, facts, {"c1": "it is not signed", "c2": "it is not signed"})
    assert reason == "2 of 4 clients refused it, c1 because it is not signed"


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        (Trial(trainings=8), None),
        (Trial(trainings=8, failures=2), None),
        (Trial(trainings=8, failures=3), "3 of 8 trainings failed, and 25% may"),
        (Trial(failed="0 of 1 clients joined in time"), "its run failed: 0 of 1 clients joined in time"),
        (Trial(trainings=8, kept_back="the loss is 2.3"), "its model was kept back: the loss is 2.3"),
    ],
)
def test_a_trial_is_judged_by_its_end_its_failures_and_its_model(trial: Trial, reason: str | None) -> None:
    said = verdict(TABLE, trial)
    assert said == reason or (said is not None and reason is not None and said.startswith(reason))


@given(st.integers(0, 100), st.integers(0, 100))
def test_fewer_failures_are_never_judged_worse(some: int, more: int) -> None:
    fewer, many = sorted((some, more))
    if verdict(TABLE, Trial(trainings=100, failures=many)) is None:
        assert verdict(TABLE, Trial(trainings=100, failures=fewer)) is None
