"""The cohort of a stage, and the verdict on a candidate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.code import CodeData, CodePlan, RolloutCohort
from fedbus.contracts.task.task import RolloutTable
from fedbus.domain.code_rollout import (
    TrialResult,
    client_rank,
    cohort_members,
    have_all_answered,
    is_in_cohort,
    rejection_reason,
    revert_reason,
    stage_cohort,
    target_code_version,
)

OLD, NEW = "a" * 40, "b" * 40
FLEET = {f"c{number}": {"site": "lab" if number % 4 else "ward"} for number in range(40)}
TABLE = RolloutTable.model_validate({"max-fail-rate": 0.25})

ids = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)
fleets = st.dictionaries(ids, st.just({"site": "lab"}), min_size=1, max_size=50)
percents = st.integers(1, 99).map(lambda share: f"{share}%")


@given(ids, ids)
def test_a_rank_is_deterministic_and_in_the_unit_interval(client: str, version: str) -> None:
    assert client_rank(client, version) == client_rank(client, version)
    assert 0 <= client_rank(client, version) < 1


@given(fleets, percents)
def test_a_percentage_is_of_the_known_clients_rounded_up(
    fleet: dict[str, dict[str, str]], share: str
) -> None:
    members = cohort_members(stage_cohort(share, fleet, NEW), fleet, NEW)
    assert len(members) == -(-len(fleet) * int(share[:-1]) // 100)


@given(fleets, percents, percents)
def test_a_larger_stage_contains_the_smaller_one(
    fleet: dict[str, dict[str, str]], one: str, other: str
) -> None:
    small, large = sorted((one, other), key=lambda share: int(share[:-1]))
    assert set(cohort_members(stage_cohort(small, fleet, NEW), fleet, NEW)) <= set(
        cohort_members(stage_cohort(large, fleet, NEW), fleet, NEW)
    )


def test_another_version_starts_with_other_clients() -> None:
    first = cohort_members(stage_cohort("25%", FLEET, OLD), FLEET, OLD)
    second = cohort_members(stage_cohort("25%", FLEET, NEW), FLEET, NEW)
    assert first != second


def test_the_last_stage_includes_clients_that_join_later() -> None:
    assert is_in_cohort(stage_cohort("100%", FLEET, NEW), "a-new-one", {}, NEW)


def test_a_label_stage_selects_clients_with_all_labels() -> None:
    cohort = stage_cohort("site=ward,board=jetson", FLEET, NEW)
    assert is_in_cohort(cohort, "c1", {"site": "ward", "board": "jetson", "floor": "2"}, NEW)
    assert not is_in_cohort(cohort, "c1", {"site": "ward"}, NEW)


def test_a_client_outside_the_cohort_stays_on_the_deployed_code() -> None:
    plan = CodePlan(code_version=OLD, candidate=NEW, cohort=RolloutCohort(labels={"site": "ward"}))
    assert target_code_version(plan, "c1", {"site": "ward"}) == NEW
    assert target_code_version(plan, "c1", {"site": "lab"}) == OLD


def test_without_a_candidate_all_clients_run_the_same_code() -> None:
    assert target_code_version(CodePlan(code_version=OLD), "c1", {}) == OLD


def test_a_stage_is_complete_when_all_answered_and_one_is_ready() -> None:
    facts = CodeData(task="mnist", candidate=NEW, clients=("c1", "c2"))
    assert have_all_answered(facts, frozenset({"c1"}), frozenset({"c2"}))
    assert not have_all_answered(facts, frozenset({"c1"}), frozenset())
    assert not have_all_answered(facts, frozenset(), frozenset({"c1", "c2"}))


def test_too_many_refusals_reject_the_candidate_with_a_reason() -> None:
    facts = CodeData(task="mnist", candidate=NEW, clients=("c1", "c2", "c3", "c4"))
    assert rejection_reason(TABLE, facts, {"c1": "it is not signed"}) is None
    reason = rejection_reason(TABLE, facts, {"c1": "it is not signed", "c2": "it is not signed"})
    assert reason == "2 of 4 clients refused it (limit 25 %); c1: it is not signed"


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        (TrialResult(trainings=8), None),
        (TrialResult(trainings=8, failures=2), None),
        (TrialResult(trainings=8, failures=3), "3 of 8 trainings failed (limit 25 %)"),
        (
            TrialResult(failed="0 of 1 clients joined in time"),
            "run failed: 0 of 1 clients joined in time",
        ),
        (TrialResult(trainings=8, kept_back="the loss is 2.3"), "model not promoted: the loss is 2.3"),
    ],
)
def test_a_trial_is_judged_by_its_end_failures_and_model(trial: TrialResult, reason: str | None) -> None:
    found = revert_reason(TABLE, trial)
    assert found == reason or (found is not None and reason is not None and found.startswith(reason))


@given(st.integers(0, 100), st.integers(0, 100))
def test_fewer_failures_never_give_a_worse_verdict(some: int, more: int) -> None:
    fewer, many = sorted((some, more))
    if revert_reason(TABLE, TrialResult(trainings=100, failures=many)) is None:
        assert revert_reason(TABLE, TrialResult(trainings=100, failures=fewer)) is None
