"""`fedbus trace`'s picture and words, of made-up traces: whole ones, and those of runs under way or cut off."""

import pytest

from fedbus.app.terminal.trace_waterfall import (
    RunStatus,
    describe_run,
    describe_waits,
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
    """A run that went through these *states*, one a second."""
    pairs = zip(["•", *states], states, strict=False)
    return [
        make_span(f"m{at}", f"run {one} → {other}", at, at + 0.01, "begun", run=RUN, reason=reason)
        for at, (one, other) in enumerate(pairs)
    ]


def make_run(*states: str, ending: SpanStatus, reason: str = "") -> SpanTree:
    """Its third round has had c1's answer; c2 trains."""
    return SpanTree(
        [
            make_span("begun", "run by manual", 0, 0.1, run=RUN),
            *make_transitions(*states, reason=reason),
            make_span("round", "round", 4, 10, "begun", ending, round=3),
            make_span("a1", "publish round_message", 4, 4.1, "round", client="c1"),
            make_span("t1", "train", 4.2, 5, "a1", client="c1"),
            make_span("a2", "publish round_message", 4, 4.1, "round", client="c2"),
            make_span("h2", "process round_message", 4.1, 10, "a2", ending, client="c2"),
            make_span("t2", "train", 4.5, 10, "h2", ending, client="c2"),
        ]
    )


def render_lines(tree: SpanTree, width: int = 100) -> dict[str, str]:
    """What is drawn, by the name that each line begins with."""
    drawn = [line.plain for line in render_waterfall(tree, width)]
    return {line.strip().partition("  ")[0]: line for line in drawn}


UNDER_WAY = make_run("requested", "recruiting", "running", ending=SpanStatus.UNDER_WAY)


def test_what_is_under_way_has_a_bar_with_an_open_end_and_is_one_tree() -> None:
    drawn = render_lines(UNDER_WAY)

    assert drawn["round 3"].split() == ["round", "3", drawn["round 3"].split()[2], "6.0", "s"]
    assert {name for name, line in drawn.items() if "▶" in line} == {
        "round 3",
        "process round_message",
        "train",
    }
    assert [line for line in drawn.values() if not line.startswith(" ")] == [drawn["run by manual"]]
    assert list(render_legend(UNDER_WAY)) == ["▶ is under way"]


def test_the_words_say_what_it_waited_for_so_far_and_what_is_done_now() -> None:
    assert list(describe_waits(UNDER_WAY)) == [
        "round 3 has taken 6.0 s so far: 92 % waiting for c2's training (8 % the bus)",
        "under way: c2's training for 5.5 s",
    ]


def test_a_run_before_its_first_round_says_so() -> None:
    assert list(describe_waits(SpanTree(make_transitions("requested")))) == ["no round has begun"]


def test_of_much_that_is_under_way_some_is_named() -> None:
    clients = [
        make_span(f"c{n}", "train", 0, n, "", SpanStatus.UNDER_WAY, client=f"c{n}") for n in range(1, 9)
    ]

    _, said = describe_waits(
        SpanTree([make_span("agg", "aggregate", 0, 9, "", SpanStatus.UNDER_WAY), *clients])
    )
    assert said.startswith("under way: c1's training for 1.0 s, c2's training for 2.0 s, ")
    assert said.endswith(", c6's training for 6.0 s, 3 more")


def test_a_server_whose_clients_tell_elsewhere_waits_for_their_answers() -> None:
    rounds = [make_span("r", "round", 0, 9, "", SpanStatus.UNDER_WAY, round=1)]
    tree = SpanTree([*rounds, make_span("a", "aggregate", 0, 9, "r", SpanStatus.UNDER_WAY)])

    assert list(describe_waits(tree)) == [
        "round 1 has taken 9.0 s so far: 100 % waiting for the clients' answers",
        "under way: waiting for the clients' answers for 9.0 s",
    ]


def test_what_was_cut_off_is_told_of_as_such() -> None:
    tree = make_run("requested", "recruiting", "running", ending=SpanStatus.CUT_OFF)

    assert render_lines(tree)["round 3"].count("✗") == 1
    assert list(render_legend(tree)) == ["✗ was cut off: its process ended before it did"]
    assert list(describe_waits(tree)) == ["round 3 was cut off, last heard of after 6.0 s"]


def test_what_hangs_on_a_step_that_is_not_kept_here_stands_below_the_first() -> None:
    tree = SpanTree(
        [
            make_span("x", "download", 0.5, 1, "elsewhere"),
            make_span("begun", "run by manual", 1, 2),
            make_span("y", "z", 1, 2, "begun"),
        ]
    )

    drawn = [line.plain[:16].rstrip() for line in render_waterfall(tree, 80)]
    assert drawn == ["run by manual", " z", " … download"]
    assert [one[0] for one in render_legend(tree)] == ["…"]


@WIDTHS
def test_every_line_is_as_wide_as_the_terminal_and_its_time_whole(width: int) -> None:
    tree = SpanTree(
        [make_span("a", "a name that is too long for any terminal of our time" * 4, 0, 3599.4, client="c1")]
    )

    (line,) = render_waterfall(tree, width)
    assert len(line.plain) <= width
    assert line.plain.endswith(" 59 min 59 s")


@pytest.mark.parametrize(
    ("states", "reason", "looked_after", "stands", "said"),
    [
        (["requested", "recruiting"], "", True, RunStatus.UNDER_WAY, "is recruiting: 10.0 s so far, since "),
        (
            ["requested", "recruiting"],
            "",
            False,
            RunStatus.LEFT,
            "was left recruiting: whoever ran it is gone, last ",
        ),
        (["requested", "running", "finished"], "all well", False, RunStatus.ENDED, "finished after 2.0 s"),
        (["requested", "failed"], "no quorum", True, RunStatus.ENDED, "failed after 1.0 s: no quorum"),
        (["requested", "cancelled"], "by hand", True, RunStatus.ENDED, "cancelled after 1.0 s: by hand"),
        ([], "", False, RunStatus.UNKNOWN, "what this machine has of it, 10.0 s"),
    ],
)
def test_the_headline_says_how_the_run_stands(
    states: list[str], reason: str, looked_after: bool, stands: RunStatus, said: str
) -> None:
    tree = make_run(*states, ending=SpanStatus.ENDED, reason=reason)

    assert run_status(tree, RUN, looked_after=looked_after) is stands
    told = describe_run(tree, RUN, stands)
    assert told.startswith(f"{RUN}: {said}" if stands is RunStatus.UNKNOWN else f"{RUN} {said}")


def test_the_headline_of_a_run_under_way_says_what_it_waits_for() -> None:
    assert describe_run(UNDER_WAY, RUN, RunStatus.UNDER_WAY).endswith("; it waits for the last round")
