"""Subjects and patterns, compared with a plain reference."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.bus.memory.subject_index import InvalidMemorySubject, SubjectIndex, check_subject

tokens = st.sampled_from(["a", "b", "c"])
subjects = st.lists(tokens, min_size=1, max_size=4).map(".".join)
patterns = st.builds(
    lambda path, rest: ".".join([*path, *rest]),
    st.lists(st.sampled_from(["a", "b", "c", "*"]), min_size=1, max_size=3),
    st.sampled_from([[], [">"]]),
)


def matches(pattern: str, subject: str) -> bool:
    """The rule of NATS, token by token."""
    wanted, given_tokens = pattern.split("."), subject.split(".")
    for at, token in enumerate(wanted):
        if token == ">":
            return len(given_tokens) > at
        if at >= len(given_tokens) or token not in ("*", given_tokens[at]):
            return False
    return len(wanted) == len(given_tokens)


@given(st.lists(patterns, max_size=8), st.lists(st.integers(0, 7)), subjects)
def test_the_matches_are_those_of_the_rule(added: list[str], removed: list[int], subject: str) -> None:
    index: SubjectIndex[int] = SubjectIndex()
    for number, pattern in enumerate(added):
        index.add(pattern, number)
    present = dict(enumerate(added))
    for number in removed:
        if (pattern_of := present.pop(number, None)) is not None:
            index.remove(pattern_of, number)
    assert sorted(index.match(subject)) == [
        one for one, pattern in present.items() if matches(pattern, subject)
    ]


@pytest.mark.parametrize("subject", ["", "a..b", "a.*", "a.>", "a b", ".a"])
def test_an_invalid_subject_is_rejected(subject: str) -> None:
    with pytest.raises(InvalidMemorySubject, match="cannot publish on"):
        check_subject(subject)
