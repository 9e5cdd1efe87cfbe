"""A trace as a person reads it in a terminal: who did what, when, for how long, and what was waited for.

    run • → requested            scheduler   ▕━                            ▏   4 ms
     publish open_run            …

Whatever hangs on something stands below it, one step to the right, in the order of time. What the
rounds waited for is bright, all else dim, failures are red. It fits in 60 columns and grows with the terminal.

A bar that ends in ▶ is under way, one that ends in ✗ was cut off: its process ended before it did. What hangs on
a step that is not kept here stands below the first, behind a ….
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from rich.text import Text

from fedbus.contracts.run import RUN
from fedbus.domain.critical_path import (
    ANSWERS,
    JOIN,
    PHASES,
    SpanStatus,
    SpanTree,
    TracedSpan,
    critical_path,
    round_waits,
)

MAX_DEPTH: Final = 10
"""Steps to the right that are shown; a chain of events is longer."""
NAME_SHARE: Final = 0.42
OWNER_WIDTH: Final = 12
TIME_WIDTH: Final = 11
MIN_BAR_WIDTH: Final = 8
EIGHTHS: Final = "▏▎▍▌▋▊▉█"
OPEN_ENDS: Final = {SpanStatus.UNDER_WAY: "▶", SpanStatus.CUT_OFF: "✗"}
DETACHED_MARK: Final = "… "
"""Before what hangs on a step that is not kept here."""
MAX_NAMED: Final = 6
"""Of what is under way so much is named."""


class RunStatus(StrEnum):
    """How a run stands, as far as its trace tells."""

    ENDED = "ended"
    UNDER_WAY = "under way"
    LEFT = "left"  # by whoever ran it, who is gone
    UNKNOWN = "unknown"  # another machine has that


@dataclass(frozen=True)
class Columns:
    """How a line is divided."""

    name: int
    bar: int

    @classmethod
    def of(cls, width: int) -> "Columns":
        name = max(20, int(width * NAME_SHARE))
        return cls(name, max(MIN_BAR_WIDTH, width - name - OWNER_WIDTH - TIME_WIDTH - 4))


def render_waterfall(tree: SpanTree, width: int) -> Iterator[Text]:
    """A line for each span."""
    columns = Columns.of(width)
    first = min((span.start for span in tree.by_id.values()), default=0.0)
    last = max((span.end for span in tree.by_id.values()), default=first)
    hot = _critical_span_ids(tree)
    for depth, span in _walk(tree):
        is_apart = bool(span.parent) and span.parent not in tree.by_id
        name = " " * min(depth, MAX_DEPTH) + (DETACHED_MARK if is_apart else "") + span_label(span)
        yield _render_line(span, name, columns, first, max(last - first, 1e-9), hot=span.id in hot)


def render_legend(tree: SpanTree) -> Iterator[str]:
    """What the marks mean that are in the picture."""
    endings = {span.ending for span in tree.by_id.values()}
    if SpanStatus.UNDER_WAY in endings:
        yield f"{OPEN_ENDS[SpanStatus.UNDER_WAY]} is under way"
    if SpanStatus.CUT_OFF in endings:
        yield f"{OPEN_ENDS[SpanStatus.CUT_OFF]} was cut off: its process ended before it did"
    if any(root.parent for root in tree.roots):
        yield f"{DETACHED_MARK}hangs on a step that another machine keeps, or that is not written yet"


def run_status(tree: SpanTree, run: str, *, looked_after: bool) -> RunStatus:
    """*looked_after*: whether whoever moved the run last still runs."""
    moves = _run_transitions(tree, run)
    if not moves:
        return RunStatus.UNKNOWN
    if _target_state(moves[-1]) in RUN.final:
        return RunStatus.ENDED
    return RunStatus.UNDER_WAY if looked_after else RunStatus.LEFT


def describe_run(tree: SpanTree, run: str, stands: RunStatus) -> str:
    """How the run stands and since when: ``mnist-3 is running: 2 min 5 s so far, since 18:14:40``."""
    spans = tree.by_id.values()
    first, last = min(one.start for one in spans), max(one.end for one in spans)
    took = format_duration(last - first)
    if stands is RunStatus.UNKNOWN:
        return f"{run}: what this machine has of it, {took}"
    moved = _run_transitions(tree, run)[-1]
    match stands:
        case RunStatus.UNDER_WAY:
            awaited = RUN.waits[RUN.states(_target_state(moved))].waiting_for
            state, since = _target_state(moved), _format_time(first)
            return f"{run} is {state}: {took} so far, since {since}; it waits for {awaited}"
        case RunStatus.LEFT:
            heard = f"last heard of at {_format_time(last)}, after {took}"
            return f"{run} was left {_target_state(moved)}: whoever ran it is gone, {heard}"
        case _:
            reason = str(moved.attributes.get("fedbus.reason", ""))
            why = f": {reason}" if reason and _target_state(moved) != "finished" else ""
            return f"{run} {_target_state(moved)} after {format_duration(moved.end - first)}{why}"


def _run_transitions(tree: SpanTree, run: str) -> list[TracedSpan]:
    """How the run itself moved, in the order of time."""
    moves = [
        span
        for span in tree.by_id.values()
        if span.name.startswith("run ") and "→" in span.name and span.attributes.get("fedbus.run") == run
    ]
    return sorted(moves, key=lambda span: span.start)


def _target_state(move: TracedSpan) -> str:
    return move.name.rpartition("→ ")[2]


def _format_time(when: float) -> str:
    at = datetime.fromtimestamp(when).astimezone()
    today = at.date() == datetime.now().astimezone().date()
    return f"{at:%H:%M:%S}" if today else f"{at:%Y-%m-%d %H:%M:%S}"


def describe_waits(tree: SpanTree) -> Iterator[str]:
    """What each round waited for: ``round 3 took 12.0 s: 81 % waiting for c2's upload``; and what is done now."""
    rounds = round_waits(tree)
    for one in rounds:
        if one.ending is SpanStatus.CUT_OFF:
            yield f"round {one.round} was cut off, last heard of after {format_duration(one.seconds)}"
            continue
        others = "; ".join(str(wait).replace("waiting for ", "") for wait in one.waits[1:3])
        more = f" ({others})" if others else ""
        took = "took {}" if one.ending is SpanStatus.ENDED else "has taken {} so far"
        yield f"round {one.round} {took.format(format_duration(one.seconds))}: {str(one).partition(': ')[2]}{more}"
    if not rounds:
        yield "no round has begun"
    if going := sorted(
        tree.under_way, key=lambda span: not span.client
    ):  # the server side waits for the clients
        named = [f"{_describe_span(span)} for {format_duration(span.seconds)}" for span in going[:MAX_NAMED]]
        rest = [f"{len(going) - MAX_NAMED} more"] if len(going) > MAX_NAMED else []
        yield f"under way: {', '.join(named + rest)}"


def _describe_span(span: TracedSpan) -> str:
    what = f"waiting for {ANSWERS}" if span.name == JOIN else PHASES.get(span.name, span_label(span))
    return f"{span.client}'s {what}" if span.client else what


def format_duration(seconds: float) -> str:
    """As a person says it: ``4 µs``, ``12 ms``, ``3.2 s``, ``2 min 5 s``."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _walk(tree: SpanTree) -> Iterator[tuple[int, TracedSpan]]:
    """Every span under what it hangs on, and how deep. A message and what is done for it stand side by side."""
    whole = [root for root in tree.roots if not root.parent]
    apart = [root for root in tree.roots if root.parent]
    todo = [(len(whole[:1]), root) for root in reversed(apart)] + [(0, root) for root in reversed(whole)]
    while todo:
        depth, span = todo.pop()
        yield depth, span
        step = 0 if span.name.startswith(("publish ", "request ")) else 1
        todo += [(depth + step, child) for child in reversed(tree.children(span))]


def _critical_span_ids(tree: SpanTree) -> set[str]:
    rounds = [span for span in tree.by_id.values() if span.name == "round"]
    return {stretch.span.id for one in rounds for stretch in critical_path(tree, one)}


def _render_line(
    span: TracedSpan, name: str, columns: Columns, first: float, whole: float, *, hot: bool
) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    line.append(f"{_truncate(name, columns.name):<{columns.name}} ", _span_style(span))
    line.append(f"{_truncate(_span_owner(span), OWNER_WIDTH):<{OWNER_WIDTH}} ", "dim")
    bar = _render_bar(
        (span.start - first) / whole, span.seconds / whole, columns.bar, OPEN_ENDS.get(span.ending, "")
    )
    line.append(bar, "bright_yellow" if hot else "red" if _has_failed(span) else "blue")
    line.append(f" {format_duration(span.seconds):>{TIME_WIDTH}}", "" if hot else "dim")
    return line


def span_label(span: TracedSpan) -> str:
    """A span by name, with what tells it from others of that name."""
    if span.name == "round":
        return f"round {span.round}"
    reason = span.attributes.get("fedbus.reason", "") if "→" in span.name else ""
    return f"{span.name}: {reason}" if reason else span.name


def _span_owner(span: TracedSpan) -> str:
    return span.client or str(span.attributes.get("service", "")).removeprefix("fedbus-")


def _has_failed(span: TracedSpan) -> bool:
    return bool(span.attributes.get("failed")) or span.ending is SpanStatus.CUT_OFF


def _span_style(span: TracedSpan) -> str:
    if _has_failed(span):
        return "red"
    if "→" in span.name:
        return "bold green"
    if span.name == "round":
        return "bold"
    return "cyan" if span.name in PHASES else ""


def _render_bar(offset: float, share: float, cells: int, open_end: str) -> str:
    """From *offset* so long a *share* of the line, in eighths of a cell; never nothing, and *open_end* at the last."""
    begin = min(int(offset * cells), cells - 1)
    eighths = max(1, round(share * cells * 8))
    full, rest = divmod(min(eighths, (cells - begin) * 8), 8)
    bar = "█" * full + (EIGHTHS[rest - 1] if rest else "")
    return " " * begin + ((bar[:-1] + open_end) if open_end else bar).ljust(cells - begin)


def _truncate(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
