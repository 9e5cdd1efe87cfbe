"""The two languages of a task's table: whatever is written, it is read or there is one clear error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.expressions.eligibility_rule import WORDS, Check, Flag, Within, rule
from fedbus.contracts.expressions.parser import DEEPEST, LONGEST, And, BadExpression, Not, Or, leaves
from fedbus.contracts.expressions.trigger import After, Cron, Drift, Every, Moved, NewCode, Rows, trigger

PIECES = st.sampled_from(
    [*WORDS, "and", "or", "not", "in", "(", ")", "..", ">=", "<", "==", "64", "1h", "30%", "'x'", "sat", "22", "cron",
     "every", "on", "clients", "drift", "drops", "after", "'0 3 * * *'", "9" * 400, "é", "\n", "$"]
)  # fmt: skip


@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map(" ".join)))
def test_whatever_is_written_is_read_or_refused_with_a_caret(text: str) -> None:
    for language in (rule, trigger):
        try:
            language(text)
        except BadExpression as error:
            what, *line, caret = str(error).split("\n")
            assert what
            assert line
            assert caret.strip() == "^"


def test_and_binds_closer_than_or_and_not_closest() -> None:
    charging, idle, gpu = Flag("charging"), Flag("idle"), Flag("gpu")
    assert rule("charging or idle and not gpu") == Or((charging, And((idle, Not(gpu)))))
    assert rule("(charging or idle) and gpu") == And((Or((charging, idle)), gpu))


def test_values_have_units() -> None:
    assert rule("model_age > 1.5h") == Check("model_age", ">", 5400)
    assert rule("battery > 30%") == rule("battery > 30") == Check("battery", ">", 30)
    assert rule("hour in 22..6") == Within("hour", 22, 6)
    assert rule("weekday in sat..mon") == Within("weekday", 5, 0)


@pytest.mark.parametrize(
    ("text", "what", "at"),
    [
        ("labeled >= 64", "nothing is called 'labeled': did you mean labelled?", 0),
        ("labelled >= 64 and bettery > 3", "did you mean battery?", 19),
        ("model_age > 1", "model_age needs a unit: 1s or 1m or 1h or 1d", 12),
        ("labelled > 3h", "labelled has no unit 'h': write 3", 11),
        ("battery > 130", "battery is at most 100", 10),
        ("charging > 3", "charging is yes or no", 9),
        ("weekday > 3", "weekday is one of mon, tue", 10),
        ("cpu", "cpu needs a comparison", 3),
        ("cpu in 80..20", "ends before it begins", 7),
        ("hour in 6..6", "this range is empty", 8),
        ("(idle", "this bracket is never closed", 0),
        ("idle idle", "expected `and`, `or` or the end", 5),
        ("", "it is empty", 0),
        ("__import__('os')", "nothing is called '__import__'", 0),
    ],
)
def test_a_rule_that_is_wrong_is_told_what_and_where(text: str, what: str, at: int) -> None:
    with pytest.raises(BadExpression) as refused:
        rule(text)
    assert what in str(refused.value)
    assert refused.value.at == at


def test_an_expression_is_bounded() -> None:
    with pytest.raises(BadExpression, match=f"more than {LONGEST} characters"):
        rule("idle or " * 200 + "idle")
    with pytest.raises(BadExpression, match=f"more than {DEEPEST} deep"):
        rule("(" * 100 + "idle" + ")" * 100)


def test_a_trigger_names_each_of_its_sources() -> None:
    text = (
        "cron '0  3 * * MON' or every 6h or labelled >= 64 on 3 clients or drift or accuracy drops 0.05 "
        "or loss rises 10% or new_code or after fashion-mnist"
    )
    assert leaves(trigger(text)) == [
        Cron("0 3 * * MON"),
        Every(6 * 3600),
        Rows("labelled", 64, 3),
        Drift(1),
        Moved("accuracy", rises=False, by=0.05, relative=False),
        Moved("loss", rises=True, by=10, relative=True),
        NewCode(),
        After("fashion-mnist"),
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("cron '0 3 * *'", "it has five fields"),
        ("cron '0 0 30 2 *'", "no cron expression"),
        ("cron '61 * * * *'", "bad minute"),
        ("cron 3", "five fields in quotes"),
        ("every 5", "every needs a unit"),
        ("every 0s", "more than 0"),
        ("labelled > 4", "write labelled >= 64 on 3 clients"),
        ("drift on 2", "write `clients` after their number"),
        ("drift on 1.5 clients", "a whole number is meant"),
        ("live_accuracy drops 0.1", "write live_accuracy < 0.8 on 2 clients"),
        ("live_accuracy < 80", "at most 1"),
        ("not drift", "there is no `not`"),
        ("after 'A B'", "the id of a task"),
        ("something", "'something' starts no run"),
    ],
)
def test_a_trigger_that_is_wrong_is_told_what(text: str, what: str) -> None:
    with pytest.raises(BadExpression, match=what):
        trigger(text)


def test_a_source_is_told_as_it_was_written() -> None:
    for text in (
        "cron '0 3 * * *'",
        "labelled >= 64 on 3 clients",
        "drift on 1 client",
        "live_accuracy < 0.8 on 2 clients",
        "loss rises 10%",
    ):
        assert str(trigger(text)) == text
