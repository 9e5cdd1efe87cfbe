"""The critical path of a round, in constructed traces with a known answer."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.domain.critical_path import (
    PathSegment,
    SpanStatus,
    SpanTree,
    TracedSpan,
    critical_path,
    round_waits,
)


def span(
    id: str,
    name: str,
    start: float,
    end: float,
    parent: str = "",
    *,
    links: tuple[str, ...] = (),
    client: str = "",
) -> TracedSpan:
    attributes: dict[str, str | int | float | bool] = {"fedbus.round": 3} if name == "round" else {}
    return TracedSpan(
        id, name, start, end, parent, links, attributes | ({"fedbus.client": client} if client else {})
    )


def make_client(name: str, *, train: tuple[float, float], upload: tuple[float, float]) -> list[TracedSpan]:
    """The spans of a client that gets its message at 0, trains and uploads; the server fetches at the end of it."""
    return [
        span(f"{name}-publish", "publish round_message", 0, 0.1, "round"),
        span(f"{name}-process", "process round_message", 0.2, upload[1], f"{name}-publish"),
        span(f"{name}-train", "train", *train, f"{name}-process", client=name),
        span(f"{name}-upload", "upload", *upload, f"{name}-process", client=name),
        span(f"{name}-reply", "publish round_reply", upload[1] - 0.01, upload[1], f"{name}-upload"),
    ]


def make_round(*clients: list[TracedSpan], end: float) -> SpanTree:
    replies = tuple(one.id for each in clients for one in each if one.name == "publish round_reply")
    return SpanTree(
        [
            span("round", "round", 0, end),
            span("aggregate", "aggregate", 0.15, end, "round", links=replies),
            *[one for each in clients for one in each],
        ]
    )


def test_a_round_waits_for_the_upload_of_the_slowest_client() -> None:
    tree = make_round(
        make_client("c1", train=(0.2, 1), upload=(1, 1.2)),
        make_client("c2", train=(0.2, 1.7), upload=(1.7, 9.8)),
        end=10,
    )

    (waits,) = round_waits(tree)
    assert str(waits) == "round 3: 81 % waiting for c2's upload"
    assert {(one.activity, one.client): round(one.share, 2) for one in waits.waits} == {
        ("upload", "c2"): 0.81,
        ("training", "c2"): 0.15,
        ("aggregation", ""): 0.02,
        ("the bus", ""): 0.02,
    }


def test_a_faster_client_is_not_on_the_path() -> None:
    tree = make_round(
        make_client("c1", train=(0.2, 8), upload=(8, 8.1)),
        make_client("c2", train=(0.2, 1), upload=(1, 1.2)),
        end=8.2,
    )

    (waits,) = round_waits(tree)
    assert {one.client for one in waits.waits} == {"c1", ""}


def test_a_round_without_messages_waits_for_the_server_app() -> None:
    (waits,) = round_waits(SpanTree([span("round", "round", 0, 2)]))

    assert str(waits) == "round 3: 100 % waiting for the ServerApp"


def test_without_client_spans_a_round_waits_for_the_last_reply() -> None:
    spans = [
        span("round", "round", 0, 10),
        span("aggregate", "aggregate", 0, 10, "round", links=("r1", "r2")),
        span("got1", "receive", 2, 3, "r1", client="c1"),
        span("got2", "receive", 8, 9, "r2", client="c2"),
    ]
    (waits,) = round_waits(SpanTree(spans))
    assert str(waits) == "round 3: 80 % waiting for c2's answer"
    assert [str(one) for one in waits.waits[1:]] == ["20 % waiting for aggregation"]

    going = [replace(one, links=(), status=SpanStatus.OPEN) for one in spans[:2]]
    (waits,) = round_waits(SpanTree(going))
    assert str(waits) == "round 3: 100 % waiting for the clients' answers"


def test_a_long_aggregation_is_on_the_path() -> None:
    tree = make_round(make_client("c1", train=(0.2, 1), upload=(1, 2)), end=10)

    assert str(round_waits(tree)[0]) == "round 3: 80 % waiting for aggregation"


def test_a_round_without_duration_has_no_waits() -> None:
    assert str(round_waits(SpanTree([span("round", "round", 1, 1)]))[0]) == "round 3: no time at all"


def test_an_incomplete_trace_still_has_its_rounds() -> None:
    tree = SpanTree(
        [span("round", "round", 0, 4, "never sent"), span("x", "train", 1, 2, "gone", client="c1")]
    )

    assert [root.id for root in tree.roots] == ["round", "x"]
    assert str(round_waits(tree)[0]) == "round 3: 100 % waiting for the ServerApp"


def test_work_in_progress_is_the_deepest_open_span() -> None:
    open_ids = {"round", "process", "train", "idle"}
    spans = [
        span("round", "round", 0, 9),
        span("dispatch", "publish round_message", 0, 1, "round"),
        span("process", "process round_message", 1, 9, "dispatch"),
        span("download", "download", 1, 2, "process"),
        span("train", "train", 2, 9, "process"),
        span("idle", "aggregate", 0, 9, "round"),
    ]
    tree = SpanTree([replace(one, status=SpanStatus.OPEN) if one.id in open_ids else one for one in spans])

    assert [one.id for one in tree.open_spans] == ["idle", "train"]
    (waits,) = round_waits(tree)
    assert waits.status is SpanStatus.OPEN
    assert str(waits).startswith("round 3: 78 % waiting for training")


def test_a_cycle_of_parents_is_left_out() -> None:
    tree = SpanTree([span("a", "one", 0, 1, "b"), span("b", "two", 0, 1, "a"), span("round", "round", 0, 1)])

    assert [root.id for root in tree.roots] == ["round"]


def test_a_chain_longer_than_the_recursion_limit_is_walked() -> None:
    chain = [span("0", "round", 0, 5000)]
    chain += [span(str(n), "process x", n, n + 1, str(n - 1)) for n in range(1, 5000)]

    path = critical_path(SpanTree(chain), chain[0])
    assert sum(segment.seconds for segment in path) == pytest.approx(5000)


@st.composite
def trees(draw: st.DrawFn) -> SpanTree:
    spans = [span("0", "round", 0, draw(st.integers(1, 50)), links=("1",))]
    for number in range(1, draw(st.integers(1, 12))):
        start = draw(st.integers(0, 50))
        parent = str(draw(st.integers(0, number - 1)))
        linked = tuple(str(one) for one in draw(st.sets(st.integers(0, number - 1), max_size=2)))
        spans.append(
            span(str(number), "train", start, start + draw(st.integers(0, 20)), parent, links=linked)
        )
    return SpanTree(spans)


@given(trees())
def test_the_path_covers_the_whole_round_once(tree: SpanTree) -> None:
    top = tree.by_id["0"]
    path: list[PathSegment] = critical_path(tree, top)

    assert path[0].start == top.start
    assert path[-1].end == top.end
    assert all(before.end == after.start for before, after in pairwise(path))
    assert all(segment.seconds > 0 for segment in path)


# --- rounds that do not wait for all their messages ---------------------------------------------------


def make_buffered_rounds() -> SpanTree:
    """Round 3 sends c1 and c2 their messages. c1 answers in it; c2, which is slow, in round 4."""
    mode: dict[str, str | int | float | bool] = {
        "fedbus.aggregation.mode": "buffered",
        "fedbus.aggregation.updates": 1,
    }
    late: dict[str, str | int | float | bool] = {
        "fedbus.aggregation.late_merged": 1,
        "fedbus.aggregation.max_staleness": 1,
    }
    first, second = span("round", "round", 0, 4), span("next", "round", 4, 10)
    return SpanTree(
        [
            replace(first, attributes={**first.attributes, **mode}),
            replace(second, attributes={**mode, **late, "fedbus.round": 4}),
            *make_client("c1", train=(0.2, 3.8), upload=(3.8, 3.9)),
            *make_client("c2", train=(0.2, 9.5), upload=(9.5, 9.9)),
            span("aggregate", "aggregate", 0.15, 4, "round", links=("c1-reply",)),
            span("join", "aggregate", 4.1, 10, "next", links=("c2-reply",)),
        ]
    )


def test_a_buffered_round_waits_for_the_updates_that_it_took() -> None:
    first, second = round_waits(make_buffered_rounds())
    assert str(first) == "round 3: 90 % waiting for c1's training"
    assert str(second).startswith("round 4: 92 % waiting for c2's training")
    for one in (first, second):
        assert sum(wait.share for wait in one.waits) == pytest.approx(1)


def test_a_round_describes_its_updates() -> None:
    first, second = round_waits(make_buffered_rounds())
    assert first.aggregation == "buffered: 1 update"
    assert second.aggregation == "buffered: 1 update, 1 late, staleness up to 1"
    assert (
        round_waits(make_round(make_client("c1", train=(0.2, 1), upload=(1, 2)), end=3))[0].aggregation == ""
    )


def test_a_simulated_round_waits_for_the_training_that_ended_last() -> None:
    """Its spans have no links: c2 began in the round before, and c1 in this one."""
    mode: dict[str, str | int | float | bool] = {"fedbus.aggregation.mode": "buffered", "fedbus.round": 4}
    tree = SpanTree(
        [
            span("before", "round", 0, 2),
            span("join-before", "aggregate", 0, 2, "before"),
            span("c2-train", "train", 0.5, 4.8, "join-before", client="c2"),
            replace(span("next", "round", 2, 5), attributes=mode),
            span("join", "aggregate", 2.1, 4.9, "next"),
            span("c1-train", "train", 2.1, 4, "join", client="c1"),
            span("c3-train", "train", 2.1, 9, "join", client="c3"),
        ]
    )
    _, waits = round_waits(tree)
    assert str(waits) == "round 4: 93 % waiting for c2's training"
    assert sum(wait.share for wait in waits.waits) == pytest.approx(1)
