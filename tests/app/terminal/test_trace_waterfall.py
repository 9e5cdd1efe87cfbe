"""The waterfall and sentences of `fedbus trace`, for runs that ended, are active or were cut off."""

from dataclasses import replace

import pytest

from fedbus.app.terminal.trace_waterfall import (
    RunStatus,
    describe_run,
    describe_waits,
    format_duration,
    render_legend,
    render_waterfall,
    run_status,
)
from fedbus.domain.critical_path import Attribute, SpanStatus, SpanTree, TracedSpan

RUN = "digits-1"
WIDTHS = pytest.mark.parametrize("width", [60, 80, 120, 200])


def make_span(
    id: str,
    name: str,
    start: float,
    end: float,
    parent: str = "",
    ending: SpanStatus = SpanStatus.ENDED,
    **about: Attribute,
) -> TracedSpan:
    attributes = {f"fedbus.{key}": value for key, value in about.items()}
    return TracedSpan(id, name, start, end, parent, (), attributes, ending)


def make_transitions(*states: str, reason: str = "") -> list[TracedSpan]:
    """The spans of a run that entered one of *states* each second."""
    pairs = zip(["•", *states], states, strict=False)
    return [
        make_span(f"m{at}", f"run {one} → {other}", at, at + 0.01, "root", run=RUN, reason=reason)
        for at, (one, other) in enumerate(pairs)
    ]


def make_run(*states: str, ending: SpanStatus, reason: str = "") -> SpanTree:
    """A run in its third round: c1 has answered, c2 trains."""
    return SpanTree(
        [
            make_span("root", "run by manual", 0, 0.1, run=RUN),
            *make_transitions(*states, reason=reason),
            make_span("round", "round", 4, 10, "root", ending, round=3),
            make_span("a1", "publish round_message", 4, 4.1, "round", client="c1"),
            make_span("t1", "train", 4.2, 5, "a1", client="c1"),
            make_span("a2", "publish round_message", 4, 4.1, "round", client="c2"),
            make_span("h2", "process round_message", 4.1, 10, "a2", ending, client="c2"),
            make_span("t2", "train", 4.5, 10, "h2", ending, client="c2"),
        ]
    )


def render_lines(tree: SpanTree, width: int = 100) -> dict[str, str]:
    """The lines of the waterfall, by the name at their start."""
    drawn = [line.plain for line in render_waterfall(tree, width)]
    return {line.strip().partition("  ")[0]: line for line in drawn}


ACTIVE = make_run("requested", "recruiting", "running", ending=SpanStatus.OPEN)


def test_a_span_in_progress_has_a_bar_with_an_open_end() -> None:
    drawn = render_lines(ACTIVE)

    assert drawn["round 3"].split() == ["round", "3", drawn["round 3"].split()[2], "6.0", "s"]
    assert {name for name, line in drawn.items() if "▶" in line} == {
        "round 3",
        "process round_message",
        "train",
    }
    assert [line for line in drawn.values() if not line.startswith(" ")] == [drawn["run by manual"]]
    assert list(render_legend(ACTIVE)) == ["▶ is in progress"]


def test_a_round_in_progress_says_what_it_has_waited_for() -> None:
    assert list(describe_waits(ACTIVE)) == [
        "round 3 has taken 6.0 s so far: 92 % waiting for c2's training (8 % the bus)",
        "in progress: c2's training for 5.5 s",
    ]


def test_of_many_clients_the_slowest_and_the_failed_are_drawn() -> None:
    clients = [make_span(f"c{n}", "train", 1, 1 + n, "r", client=f"c{n}") for n in range(1, 31)]
    clients[1] = replace(clients[1], attributes={**clients[1].attributes, "failed": True})
    tree = SpanTree([make_span("r", "round", 0, 40, round=1), *clients])
    drawn = [line.plain for line in render_waterfall(tree, 100)]

    assert [line.split()[1] for line in drawn if line.strip().startswith("train ")] == [
        "c2",
        *(f"c{n}" for n in range(24, 31)),
    ]
    assert [line.split() for line in drawn if "…" in line] == [
        ["…", "and", "22", "more", "clients", "1.0", "s", "to", "23.0", "s"]
    ]
    assert len(list(render_waterfall(tree, 100, max_clients=None))) == 31


def test_a_run_before_its_first_round_says_so() -> None:
    assert list(describe_waits(SpanTree(make_transitions("requested")))) == ["no round has started"]


def test_the_first_spans_in_progress_are_named() -> None:
    clients = [make_span(f"c{n}", "train", 0, n, "", SpanStatus.OPEN, client=f"c{n}") for n in range(1, 9)]

    _, sentence = describe_waits(
        SpanTree([make_span("agg", "aggregate", 0, 9, "", SpanStatus.OPEN), *clients])
    )
    assert sentence.startswith("in progress: c1's training for 1.0 s, c2's training for 2.0 s, ")
    assert sentence.endswith(", c6's training for 6.0 s, 3 more")


def test_without_client_spans_the_server_waits_for_answers() -> None:
    rounds = [make_span("r", "round", 0, 9, "", SpanStatus.OPEN, round=1)]
    tree = SpanTree([*rounds, make_span("a", "aggregate", 0, 9, "r", SpanStatus.OPEN)])

    assert list(describe_waits(tree)) == [
        "round 1 has taken 9.0 s so far: 100 % waiting for the clients' answers",
        "in progress: waiting for the clients' answers for 9.0 s",
    ]


def test_a_cut_off_span_is_marked() -> None:
    tree = make_run("requested", "recruiting", "running", ending=SpanStatus.CUT_OFF)

    assert render_lines(tree)["round 3"].count("✗") == 1
    assert list(render_legend(tree)) == ["✗ is cut off: its process ended before the span did"]
    assert list(describe_waits(tree)) == ["round 3 was cut off after 6.0 s"]


def test_a_span_without_its_parent_is_below_the_first() -> None:
    tree = SpanTree(
        [
            make_span("x", "download", 0.5, 1, "elsewhere"),
            make_span("root", "run by manual", 1, 2),
            make_span("y", "z", 1, 2, "root"),
        ]
    )

    drawn = [line.plain[:16].rstrip() for line in render_waterfall(tree, 80)]
    assert drawn == ["run by manual", " z", " … download"]
    assert [one[0] for one in render_legend(tree)] == ["…"]


@WIDTHS
def test_every_line_fits_and_its_time_is_whole(width: int) -> None:
    tree = SpanTree([make_span("a", "a name that is too long for any terminal" * 4, 0, 3599.4, client="c1")])

    (line,) = render_waterfall(tree, width)
    assert len(line.plain) <= width
    assert line.plain.endswith(" 59 min 59 s")


@pytest.mark.parametrize(
    ("states", "reason", "has_owner", "status", "text"),
    [
        (["requested", "recruiting"], "", True, RunStatus.ACTIVE, "is recruiting: 10.0 s so far, since "),
        (
            ["requested", "recruiting"],
            "",
            False,
            RunStatus.ABANDONED,
            "was abandoned while recruiting: its process has ended; the last span ended at ",
        ),
        (["requested", "running", "finished"], "all well", False, RunStatus.ENDED, "finished after 2.0 s"),
        (["requested", "failed"], "no quorum", True, RunStatus.ENDED, "failed after 1.0 s: no quorum"),
        (["requested", "cancelled"], "by hand", True, RunStatus.ENDED, "cancelled after 1.0 s: by hand"),
        ([], "", False, RunStatus.UNKNOWN, "the part of its trace on this machine, 10.0 s"),
    ],
)
def test_the_headline_describes_the_state_of_the_run(
    states: list[str], reason: str, has_owner: bool, status: RunStatus, text: str
) -> None:
    tree = make_run(*states, ending=SpanStatus.ENDED, reason=reason)

    assert run_status(tree, RUN, has_owner=has_owner) is status
    headline = describe_run(tree, RUN, status)
    assert headline.startswith(f"{RUN}: {text}" if status is RunStatus.UNKNOWN else f"{RUN} {text}")


def test_the_headline_of_an_active_run_says_what_it_waits_for() -> None:
    assert describe_run(ACTIVE, RUN, RunStatus.ACTIVE).endswith("; it waits for the last round")


def test_durations_have_the_largest_unit_that_fits() -> None:
    durations = [0, 4e-6, 0.012, 3.2, 125, 7260]
    assert [format_duration(one) for one in durations] == [
        "0 s",
        "4 µs",
        "12 ms",
        "3.2 s",
        "2 min 5 s",
        "2 h 1 min",
    ]
