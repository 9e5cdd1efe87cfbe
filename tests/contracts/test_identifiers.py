"""Ids: safe as a token of a subject and as a part of a file name."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.identifiers import (
    ID_PATTERN,
    BadId,
    client_id,
    federation_id,
    run_id,
    task_id,
)

ids = st.from_regex(ID_PATTERN, fullmatch=True)


@given(ids)
def test_a_valid_id_is_not_changed(value: str) -> None:
    assert [str(client_id(value)), str(task_id(value)), str(federation_id(value))] == [value] * 3


@given(ids)
def test_no_id_changes_the_shape_of_a_subject_or_a_path(value: str) -> None:
    assert not set(value) & set(".*> /\\\0\r\n\t")
    assert value not in ("", ".", "..")


@given(st.text())
def test_an_invalid_id_is_rejected(text: str) -> None:
    if re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", text):
        assert client_id(text) == text
    else:
        with pytest.raises(BadId):
            client_id(text)


@pytest.mark.parametrize("bad", ["*", ">", "a.b", "", "-a", "A", "c1\n", "ä", "a" * 64, "../up", "a b"])
def test_the_error_describes_a_valid_id(bad: str) -> None:
    with pytest.raises(BadId, match="is not a valid client id: use 1 to 63 lower-case letters") as caught:
        client_id(bad)

    assert caught.value.value == bad


def test_runs_are_counted_within_their_task() -> None:
    assert run_id(task_id("mnist"), 12) == "mnist-12"


def test_a_run_id_that_is_too_long_is_rejected() -> None:
    with pytest.raises(BadId):
        run_id(task_id("a" * 62), 12)
