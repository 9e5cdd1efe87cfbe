"""Eligibility rules: every rule can be evaluated on every device, and every unmet rule has a reason."""

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.expressions.eligibility_rule import (
    COMPARISONS,
    RULE_VARIABLES,
    Comparison,
    FlagCheck,
    InRange,
    Rule,
    VariableKind,
    parse_rule,
)
from fedbus.contracts.expressions.parser import And, Not, Or
from fedbus.domain.eligibility import clock_inputs, is_satisfied, unmet_reason

NUMBERS = [name for name, variable in RULE_VARIABLES.items() if variable.kind is not VariableKind.FLAG]
FLAGS = [name for name, variable in RULE_VARIABLES.items() if variable.kind is VariableKind.FLAG]
VALUES = st.floats(0, 200)
LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.builds(Comparison, st.sampled_from(NUMBERS), st.sampled_from(COMPARISONS), VALUES),
    st.builds(InRange, st.sampled_from(NUMBERS), VALUES, VALUES),
    st.builds(FlagCheck, st.sampled_from(FLAGS)),
)
RULES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: And(tuple(parts))),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Or(tuple(parts))),
        inner.map(Not),
    ),
    max_leaves=8,
)
FACTS = st.dictionaries(st.sampled_from(list(RULE_VARIABLES)), st.one_of(st.none(), VALUES))


@given(RULES, FACTS)
def test_there_is_a_reason_exactly_if_a_rule_is_unmet(some: Rule, facts: dict[str, float | None]) -> None:
    reason = unmet_reason(some, facts)
    assert (reason is None) == is_satisfied(some, facts)
    assert reason != ""


@given(RULES, RULES, FACTS)
def test_and_or_and_not_follow_boolean_algebra(
    one: Rule, other: Rule, facts: dict[str, float | None]
) -> None:
    assert is_satisfied(And((one, other)), facts) == (is_satisfied(one, facts) and is_satisfied(other, facts))
    assert is_satisfied(Or((one, other)), facts) == (is_satisfied(one, facts) or is_satisfied(other, facts))
    assert is_satisfied(Not(one), facts) != is_satisfied(one, facts)
    assert is_satisfied(Not(And((one, other))), facts) == is_satisfied(Or((Not(one), Not(other))), facts)


@pytest.mark.parametrize(
    ("text", "facts", "reason"),
    [
        ("labelled >= 64", {"labelled": 12}, "labelled is 12, and should be at least 64"),
        ("labelled >= 64", {}, "labelled is 0 (not available), and should be at least 64"),
        (
            "cpu < 80 and labelled >= 3",
            {"cpu": 91.2, "labelled": 5},
            "cpu is 91.2 %, and should be below 80 %",
        ),
        (
            "labelled >= 64 and (battery > 30 or charging)",
            {"labelled": 70, "battery": 12, "charging": 0},
            "either battery is 12 %, and should be above 30 %, or the device is not charging",
        ),
        (
            "not (cpu > 50 and gpu)",
            {"cpu": 60, "gpu": 1},
            "either cpu is 60 %, and should be at most 50 %, or the device has a GPU, and should not",
        ),
        (
            "not (cpu > 50 or gpu)",
            {"cpu": 60, "gpu": 1},
            "cpu is 60 %, and should be at most 50 %, and the device has a GPU, and should not",
        ),
        ("not charging", {"charging": 1}, "the device is charging, and should not be"),
        ("not (cpu > 50)", {"cpu": 60}, "cpu is 60 %, and should be at most 50 %"),
        ("hour in 22..6", {"hour": 12.5}, "hour is 12:30, and should be from 22:00 before 06:00"),
        ("weekday in sat..sun", {"weekday": 2}, "weekday is wed, and should be from sat to sun"),
        ("model_age > 1h", {"model_age": 720}, "model_age is 12 min, and should be above 1 h"),
    ],
)
def test_a_reason_names_the_failing_part_and_its_values(
    text: str, facts: dict[str, float | None], reason: str
) -> None:
    assert unmet_reason(parse_rule(text), facts) == reason


@pytest.mark.parametrize(
    ("text", "at", "is_within"),
    [
        ("hour in 22..6", "22:00", True),
        ("hour in 22..6", "05:59", True),
        ("hour in 22..6", "06:00", False),
        ("hour in 22..6", "21:59", False),
        ("hour in 8..18", "17:59", True),
        ("hour in 8..18", "18:00", False),
        ("weekday in fri..mon", "12:00", True),  # 2026-03-14 is a Saturday
        ("weekday in mon..fri", "12:00", False),
    ],
)
def test_ranges_of_hours_and_weekdays_wrap(text: str, at: str, is_within: bool) -> None:
    facts = clock_inputs(datetime.fromisoformat(f"2026-03-14T{at}"))
    assert is_satisfied(parse_rule(text), facts) is is_within


def test_a_device_without_battery_counts_as_charged_and_charging() -> None:
    assert is_satisfied(parse_rule("battery > 30 and charging and not gpu"), {"battery": None})
    assert is_satisfied(parse_rule("model_age > 30d"), {}), "a missing model counts as infinitely old"
