"""The languages of rules and triggers: any text is parsed, or rejected with one clear error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.expressions.eligibility_rule import (
    RULE_VARIABLES,
    Comparison,
    FlagCheck,
    InRange,
    parse_rule,
)
from fedbus.contracts.expressions.parser import MAX_CHARS, MAX_DEPTH, And, BadExpression, Not, Or, leaves
from fedbus.contracts.expressions.trigger import (
    CronCondition,
    DriftCondition,
    IntervalCondition,
    MetricChangeCondition,
    NewCodeCondition,
    RowCountCondition,
    TaskFinishedCondition,
    parse_trigger,
)

PIECES = st.sampled_from(
    [*RULE_VARIABLES, "and", "or", "not", "in", "(", ")", "..", ">=", "<", "==", "64", "1h", "30%", "'x'", "sat", "22",
     "cron", "every", "on", "clients", "drift", "drops", "after", "'0 3 * * *'", "9" * 400, "é", "\n", "$"]
)  # fmt: skip


@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map(" ".join)))
def test_any_text_is_parsed_or_rejected_with_a_caret(text: str) -> None:
    for language in (parse_rule, parse_trigger):
        try:
            language(text)
        except BadExpression as error:
            what, *line, caret = str(error).split("\n")
            assert what
            assert line
            assert caret.strip() == "^"


def test_not_binds_closer_than_and_and_and_closer_than_or() -> None:
    charging, idle, gpu = FlagCheck("charging"), FlagCheck("idle"), FlagCheck("gpu")
    assert parse_rule("charging or idle and not gpu") == Or((charging, And((idle, Not(gpu)))))
    assert parse_rule("(charging or idle) and gpu") == And((Or((charging, idle)), gpu))


def test_values_have_units() -> None:
    assert parse_rule("model_age > 1.5h") == Comparison("model_age", ">", 5400)
    assert parse_rule("battery > 30%") == parse_rule("battery > 30") == Comparison("battery", ">", 30)
    assert parse_rule("hour in 22..6") == InRange("hour", 22, 6)
    assert parse_rule("weekday in sat..mon") == InRange("weekday", 5, 0)


@pytest.mark.parametrize(
    ("text", "what", "at"),
    [
        ("labeled >= 64", "unknown variable 'labeled': did you mean labelled?", 0),
        ("labelled >= 64 and bettery > 3", "did you mean battery?", 19),
        ("model_age > 1", "model_age needs a unit: 1s or 1m or 1h or 1d", 12),
        ("labelled > 3h", "labelled cannot have the unit 'h': write 3", 11),
        ("battery > 130", "battery cannot be 130 (limit 100)", 10),
        ("charging > 3", "charging is a flag", 9),
        ("weekday > 3", "weekday must be one of mon, tue", 10),
        ("cpu", "cpu needs a comparison", 3),
        ("cpu in 80..20", "the end of this range is below its start", 7),
        ("hour in 6..6", "this range is empty", 8),
        ("(idle", "this parenthesis is not closed", 0),
        ("idle idle", "expected `and`, `or` or the end", 5),
        ("", "the expression is empty", 0),
        ("__import__('os')", "unknown variable '__import__'", 0),
    ],
)
def test_the_error_of_a_rule_has_problem_and_position(text: str, what: str, at: int) -> None:
    with pytest.raises(BadExpression) as caught:
        parse_rule(text)
    assert what in str(caught.value)
    assert caught.value.at == at


def test_length_and_depth_of_an_expression_are_limited() -> None:
    with pytest.raises(BadExpression, match=rf"has \d+ characters \(limit {MAX_CHARS}\)"):
        parse_rule("idle or " * 200 + "idle")
    with pytest.raises(BadExpression, match=rf"nested too deeply \(limit {MAX_DEPTH}\)"):
        parse_rule("(" * 100 + "idle" + ")" * 100)


def test_a_trigger_has_all_its_conditions() -> None:
    text = (
        "cron '0  3 * * MON' or every 6h or labelled >= 64 on 3 clients or drift or accuracy drops 0.05 "
        "or loss rises 10% or new_code or after fashion-mnist"
    )
    assert leaves(parse_trigger(text)) == [
        CronCondition("0 3 * * MON"),
        IntervalCondition(6 * 3600),
        RowCountCondition("labelled", 64, 3),
        DriftCondition(1),
        MetricChangeCondition("accuracy", rises=False, by=0.05, relative=False),
        MetricChangeCondition("loss", rises=True, by=10, relative=True),
        NewCodeCondition(),
        TaskFinishedCondition("fashion-mnist"),
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("cron '0 3 * *'", "it needs five fields"),
        ("cron '0 0 30 2 *'", "is not a valid cron expression"),
        ("cron '61 * * * *'", "bad minute"),
        ("cron 3", "five fields in quotes"),
        ("every 5", "every needs a unit"),
        ("every 0s", "this must be greater than 0"),
        ("labelled > 4", "write labelled >= 64 on 3 clients"),
        ("drift on 2", "write `clients` after the number"),
        ("drift on 1.5 clients", "this must be a whole number"),
        ("live_accuracy drops 0.1", "write live_accuracy < 0.8 on 2 clients"),
        ("live_accuracy < 80", "at most 1"),
        ("not drift", "a trigger cannot contain `not`"),
        ("after 'A B'", "after needs the id of a task"),
        ("something", "unknown condition 'something'"),
    ],
)
def test_the_error_of_a_trigger_names_the_problem(text: str, what: str) -> None:
    with pytest.raises(BadExpression, match=what):
        parse_trigger(text)


def test_the_text_of_a_condition_is_as_it_was_written() -> None:
    for text in (
        "cron '0 3 * * *'",
        "labelled >= 64 on 3 clients",
        "drift on 1 client",
        "live_accuracy < 0.8 on 2 clients",
        "loss rises 10%",
    ):
        assert str(parse_trigger(text)) == text
