"""Bars and histograms of the label distribution."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedbus.app.terminal.label_distribution import (
    MAX_BARS,
    divide_width,
    has_legend,
    render_bar,
    render_histogram,
    render_legend,
    render_range,
    shown_clients,
)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=36), st.integers(1, 120))
def test_a_bar_has_its_width_and_each_class_that_fits(counts: list[int], width: int) -> None:
    lengths = divide_width(np.array(counts), width)
    present = np.count_nonzero(counts)
    assert sum(lengths) == (width if present else 0)
    assert np.count_nonzero(lengths) == min(present, width)
    assert all(length == 0 for length, count in zip(lengths, counts, strict=True) if count == 0)


def test_the_parts_of_a_bar_are_in_proportion() -> None:
    assert render_bar(np.array([50, 0, 25, 25]), 8).plain == "00002233"


def test_many_classes_are_merged_in_the_legend() -> None:
    names = [f"n{number}" for number in range(100)]
    assert render_legend(names).plain.startswith("0 n0 to n2  1 n3 to n5")
    assert (has_legend(names), has_legend(["0", "1"])) == (True, False)


def test_shown_clients_reach_from_smallest_to_largest() -> None:
    sizes = np.random.default_rng(0).permutation(1000)
    shown = shown_clients(sizes)
    assert len(shown) == MAX_BARS
    assert [sizes[shown[0]], sizes[shown[-1]]] == [0, 999]
    assert shown_clients(sizes[:3]) == [0, 1, 2]


def test_a_histogram_counts_clients() -> None:
    assert render_histogram(np.array([1, 2, 2, 2, 2, 4])) == "▂█ ▂"
    assert render_range(np.array([7, 7])) == "7"
    assert render_range(np.array([1, 2, 6])) == "1 to 6, median 2"
    assert render_range(np.repeat([1, 2], 50)) == "1 to 2, median 2   ██"
