"""Where a round's time went, by client."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.domain.time_split import Answered, split

NOON = datetime(2026, 3, 14, 12, 0, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def test_what_is_not_training_is_the_way_and_what_comes_after_is_waiting() -> None:
    times = split([Answered("c1", at(0), at(5), 4.0), Answered("c2", at(0), at(9), 8.5)], at(10))
    assert times["c1"] == pytest.approx({"train_s": 4.0, "transfer_s": 1.0, "wait_s": 5.0})
    assert times["c2"] == pytest.approx({"train_s": 8.5, "transfer_s": 0.5, "wait_s": 1.0})


def test_training_and_evaluation_of_one_client_are_added_and_it_waits_from_the_last() -> None:
    times = split([Answered("c1", at(0), at(2), 1.0), Answered("c1", at(4), at(6), 1.5)], at(7))
    assert times["c1"] == pytest.approx({"train_s": 2.5, "transfer_s": 1.5, "wait_s": 1.0})


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(-10, 10), st.floats(-10, 10), st.floats(-5, 50)),
        max_size=8,
    ),
    st.floats(-10, 20),
)
def test_no_time_is_less_than_nothing_whatever_the_clocks_say(
    answers: list[tuple[str, float, float, float]], ended: float
) -> None:
    told = [Answered(client, at(asked), at(replied), train) for client, asked, replied, train in answers]
    times = split(told, at(ended))
    assert times.keys() == {one.client for one in told}
    assert all(seconds >= 0 for mine in times.values() for seconds in mine.values())
