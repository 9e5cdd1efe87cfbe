"""The time of a round, by client."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.learning.round_timing import ExchangeTiming, split_round_time


def test_a_round_is_training_then_transfer_then_waiting() -> None:
    times = split_round_time([ExchangeTiming("c1", 0, 5, 4.0), ExchangeTiming("c2", 0, 9, 8.5)], 10)
    assert times["c1"] == pytest.approx({"train_s": 4.0, "transfer_s": 1.0, "wait_s": 5.0})
    assert times["c2"] == pytest.approx({"train_s": 8.5, "transfer_s": 0.5, "wait_s": 1.0})


def test_training_and_evaluation_add_up_and_waiting_starts_after_both() -> None:
    times = split_round_time([ExchangeTiming("c1", 4, 6, 1.5), ExchangeTiming("c1", 0, 2, 1.0)], 7)
    assert times["c1"] == pytest.approx({"train_s": 2.5, "transfer_s": 1.5, "wait_s": 1.0})


def test_the_slowest_client_comes_first() -> None:
    times = split_round_time(
        [ExchangeTiming("c1", 0, 5, 4.0), ExchangeTiming("c2", 0, 9, 8.5), ExchangeTiming("c3", 0, 7, 1.0)],
        10,
    )
    assert list(times) == ["c2", "c3", "c1"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(-10, 10), st.floats(-10, 10), st.floats(-5, 50)),
        max_size=8,
    ),
    st.floats(-10, 20),
)
def test_no_time_is_negative_whatever_a_client_reports(
    rows: list[tuple[str, float, float, float]], round_end: float
) -> None:
    exchanges = [ExchangeTiming(*row) for row in rows]
    times = split_round_time(exchanges, round_end)
    assert times.keys() == {exchange.client for exchange in exchanges}
    assert all(seconds >= 0 for parts in times.values() for seconds in parts.values())
