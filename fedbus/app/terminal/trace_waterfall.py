"""A trace drawn in the terminal: each span with its agent, time and duration, and what the run waited for.

    run • → requested            scheduler   ▕━                            ▏   4 ms
     publish open_run            …

A child span is below its parent, one step to the right, in the order of time. The critical path of the rounds is
bright, everything else dim, failures are red. The waterfall fits in 60 columns and grows with the terminal.

Of many clients with the same span below one parent, those on the critical path, those in progress, those that failed
and the slowest are drawn, and a line counts the others.

A bar that ends in ▶ is a span in progress; one that ends in ✗ is cut off: its process ended before the span did. A
span whose parent is not in these trace files is below the first span, marked with ….
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Final

from rich.text import Text

from fedbus.contracts.run import RUN, RunState
from fedbus.domain.critical_path import (
    ANSWERS,
    JOIN,
    PHASES,
    SpanStatus,
    SpanTree,
    TracedSpan,
    critical_path,
    describe_aggregation,
    round_waits,
)

MAX_DEPTH: Final = 10
"""The deepest indentation; a chain of events can be longer."""
NAME_SHARE: Final = 0.42
OWNER_WIDTH: Final = 12
TIME_WIDTH: Final = 11
MIN_BAR_WIDTH: Final = 8
EIGHTHS: Final = "▏▎▍▌▋▊▉█"
OPEN_ENDS: Final = {SpanStatus.OPEN: "▶", SpanStatus.CUT_OFF: "✗"}
DETACHED_MARK: Final = "… "
"""The mark of a span whose parent is not in the trace files."""
MAX_CLIENTS: Final = 8
"""The clients that are drawn of those with the same span below one parent, unless all are asked for."""
MAX_NAMED: Final = 6
"""The spans in progress that are named."""


class RunStatus(StrEnum):
    """The status of a run according to its trace."""

    ENDED = "ended"
    ACTIVE = "active"
    ABANDONED = "abandoned"  # its process has ended before the run did
    UNKNOWN = "unknown"  # the transitions of the run are in the trace files of another machine


@dataclass(frozen=True)
class Columns:
    """The widths of the columns of a line."""

    name: int
    bar: int

    @classmethod
    def from_width(cls, width: int) -> "Columns":
        name = max(20, int(width * NAME_SHARE))
        return cls(name, max(MIN_BAR_WIDTH, width - name - OWNER_WIDTH - TIME_WIDTH - 4))


@dataclass(frozen=True)
class HiddenClients:
    """Spans of clients that are not drawn."""

    spans: Sequence[TracedSpan]

    def __str__(self) -> str:
        count = len({span.client for span in self.spans})
        return f"… and {count} more client{'s' * (count > 1)}"

    @property
    def durations(self) -> str:
        """The shortest and the longest duration."""
        shortest = format_duration(min(span.seconds for span in self.spans))
        longest = format_duration(max(span.seconds for span in self.spans))
        return shortest if shortest == longest else f"{shortest} to {longest}"


def render_waterfall(tree: SpanTree, width: int, *, max_clients: int | None = MAX_CLIENTS) -> Iterator[Text]:
    """Render one line for each span, for *max_clients* of the clients with the same span; None: for all."""
    columns = Columns.from_width(width)
    first = min((span.start for span in tree.by_id.values()), default=0.0)
    last = max((span.end for span in tree.by_id.values()), default=first)
    critical = _critical_span_ids(tree)
    for depth, span in _walk(tree, max_clients, critical):
        if isinstance(span, HiddenClients):
            name = _truncate(" " * min(depth, MAX_DEPTH) + str(span), columns.name)
            yield Text(
                f"{name:<{columns.name}} {'':<{OWNER_WIDTH}} {span.durations}",
                "dim",
                no_wrap=True,
                overflow="crop",
            )
            continue
        is_detached = bool(span.parent) and span.parent not in tree.by_id
        name = " " * min(depth, MAX_DEPTH) + (DETACHED_MARK if is_detached else "") + span_label(span)
        yield _render_line(
            span, name, columns, first, max(last - first, 1e-9), is_critical=span.id in critical
        )


def render_legend(tree: SpanTree) -> Iterator[str]:
    """Explain the marks that the waterfall contains."""
    statuses = {span.status for span in tree.by_id.values()}
    if SpanStatus.OPEN in statuses:
        yield f"{OPEN_ENDS[SpanStatus.OPEN]} is in progress"
    if SpanStatus.CUT_OFF in statuses:
        yield f"{OPEN_ENDS[SpanStatus.CUT_OFF]} is cut off: its process ended before the span did"
    if any(root.parent for root in tree.roots):
        yield f"{DETACHED_MARK}has a parent on another machine, or one that is not written yet"


def run_status(tree: SpanTree, run: str, *, has_owner: bool) -> RunStatus:
    """Return the status of a run. *has_owner*: whether the process that moved the run last is still running."""
    transitions = _run_transitions(tree, run)
    if not transitions:
        return RunStatus.UNKNOWN
    if _target_state(transitions[-1]) in RUN.final:
        return RunStatus.ENDED
    return RunStatus.ACTIVE if has_owner else RunStatus.ABANDONED


def describe_run(tree: SpanTree, run: str, status: RunStatus) -> str:
    """Describe the state of a run: ``mnist-3 is running: 2 min 5 s so far, since 18:14:40``."""
    spans = tree.by_id.values()
    first, last = min(one.start for one in spans), max(one.end for one in spans)
    duration = format_duration(last - first)
    if status is RunStatus.UNKNOWN:
        return f"{run}: the part of its trace on this machine, {duration}"
    transition = _run_transitions(tree, run)[-1]
    match status:
        case RunStatus.ACTIVE:
            state, since = _target_state(transition), _format_time(first)
            waiting_for = RUN.waits[RUN.states(state)].waiting_for
            return f"{run} is {state}: {duration} so far, since {since}; it waits for {waiting_for}"
        case RunStatus.ABANDONED:
            last_span = f"the last span ended at {_format_time(last)}, after {duration}"
            return (
                f"{run} was abandoned while {_target_state(transition)}: its process has ended; {last_span}"
            )
        case _:
            state, reason = _target_state(transition), str(transition.attributes.get("fedbus.reason", ""))
            suffix = f": {reason}" if reason and state != RunState.FINISHED else ""
            return f"{run} {state} after {format_duration(transition.end - first)}{suffix}"


def _run_transitions(tree: SpanTree, run: str) -> list[TracedSpan]:
    """Return the spans of the run's own transitions, in the order of time."""
    transitions = [
        span
        for span in tree.by_id.values()
        if span.name.startswith("run ") and "→" in span.name and span.attributes.get("fedbus.run") == run
    ]
    return sorted(transitions, key=lambda span: span.start)


def _target_state(transition: TracedSpan) -> str:
    return transition.name.rpartition("→ ")[2]


def _format_time(seconds: float) -> str:
    at = datetime.fromtimestamp(seconds).astimezone()
    is_today = at.date() == datetime.now().astimezone().date()
    return f"{at:%H:%M:%S}" if is_today else f"{at:%Y-%m-%d %H:%M:%S}"


def describe_waits(tree: SpanTree) -> Iterator[str]:
    """Describe what each round waited for, and which spans are in progress.

    ``round 3 took 12.0 s: 81 % waiting for c2's upload``
    """
    rounds = round_waits(tree)
    for one in rounds:
        if one.status is SpanStatus.CUT_OFF:
            yield f"round {one.round} was cut off after {format_duration(one.seconds)}"
            continue
        others = "; ".join(str(wait).replace("waiting for ", "") for wait in one.waits[1:3])
        more = (f" ({others})" if others else "") + (f"; {one.aggregation}" if one.aggregation else "")
        duration = format_duration(one.seconds)
        took = f"took {duration}" if one.status is SpanStatus.ENDED else f"has taken {duration} so far"
        yield f"round {one.round} {took}: {str(one).partition(': ')[2]}{more}"
    if not rounds:
        yield "no round has started"
    # spans of clients first: the server side waits for them
    if spans := sorted(tree.open_spans, key=lambda span: not span.client):
        named = [f"{_describe_span(span)} for {format_duration(span.seconds)}" for span in spans[:MAX_NAMED]]
        rest = [f"{len(spans) - MAX_NAMED} more"] if len(spans) > MAX_NAMED else []
        yield f"in progress: {', '.join(named + rest)}"


def _describe_span(span: TracedSpan) -> str:
    what = f"waiting for {ANSWERS}" if span.name == JOIN else PHASES.get(span.name, span_label(span))
    return f"{span.client}'s {what}" if span.client else what


def format_duration(seconds: float) -> str:
    """Format a duration: ``4 µs``, ``12 ms``, ``3.2 s``, ``2 min 5 s``."""
    if seconds == 0:
        return "0 s"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _walk(
    tree: SpanTree, max_clients: int | None, critical: Collection[str]
) -> Iterator[tuple[int, TracedSpan | HiddenClients]]:
    """Yield each span after its parent, with its depth. The span that handles a message is as deep as the message."""
    preferred = _with_ancestors(tree, critical)
    choose = partial(_choose_clients, limit=max_clients, preferred=preferred)
    complete = choose([root for root in tree.roots if not root.parent])
    detached = choose([root for root in tree.roots if root.parent])
    todo = [(len(complete[:1]), root) for root in reversed(detached)]
    todo += [(0, root) for root in reversed(complete)]
    while todo:
        depth, span = todo.pop()
        yield depth, span
        if isinstance(span, HiddenClients):
            continue
        step = 0 if span.name.startswith(("publish ", "request ")) else 1
        todo += [(depth + step, child) for child in reversed(choose(tree.children(span)))]


def _choose_clients(
    siblings: Sequence[TracedSpan], *, limit: int | None, preferred: Collection[str]
) -> list[TracedSpan | HiddenClients]:
    """Return *siblings* with at most *limit* spans of clients of each name; `HiddenClients` follow the last of them."""
    by_name: dict[str, list[TracedSpan]] = {}
    for span in siblings:
        if span.client:
            by_name.setdefault(span.name, []).append(span)
    hidden: set[str] = set()
    after: dict[str, HiddenClients] = {}
    for spans in by_name.values():
        # A line that counts one hidden span would take as much space as the span.
        if limit is not None and len(spans) > limit + 1:
            ranked = sorted(
                spans,
                key=lambda span: (
                    span.id in preferred,
                    span.status is SpanStatus.OPEN,
                    _has_failed(span),
                    span.seconds,
                ),
                reverse=True,
            )
            hidden |= {span.id for span in ranked[limit:]}
            after[spans[-1].id] = HiddenClients(ranked[limit:])
    chosen: list[TracedSpan | HiddenClients] = []
    for span in siblings:
        if span.id not in hidden:
            chosen.append(span)
        if span.id in after:
            chosen.append(after[span.id])
    return chosen


def _with_ancestors(tree: SpanTree, ids: Collection[str]) -> set[str]:
    found: set[str] = set()
    for span_id in ids:
        at = span_id
        while at in tree.by_id and at not in found:
            found.add(at)
            at = tree.by_id[at].parent
    return found


def _critical_span_ids(tree: SpanTree) -> set[str]:
    rounds = [span for span in tree.by_id.values() if span.name == "round"]
    return {segment.span.id for one in rounds for segment in critical_path(tree, one)}


def _render_line(
    span: TracedSpan, name: str, columns: Columns, first: float, whole: float, *, is_critical: bool
) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    line.append(f"{_truncate(name, columns.name):<{columns.name}} ", _span_style(span))
    line.append(f"{_truncate(_span_owner(span), OWNER_WIDTH):<{OWNER_WIDTH}} ", "dim")
    bar = _render_bar(
        (span.start - first) / whole, span.seconds / whole, columns.bar, OPEN_ENDS.get(span.status, "")
    )
    line.append(bar, "bright_yellow" if is_critical else "red" if _has_failed(span) else "blue")
    line.append(f" {format_duration(span.seconds):>{TIME_WIDTH}}", "" if is_critical else "dim")
    return line


def span_label(span: TracedSpan) -> str:
    """Return the name of a span, with the round or the reason."""
    if span.name == "round":
        aggregation = describe_aggregation(span)
        return f"round {span.round}" + (f": {aggregation}" if aggregation else "")
    if clients := span.attributes.get("fedbus.clients"):
        return f"{span.name}: {clients} clients"
    reason = span.attributes.get("fedbus.reason", "") if "→" in span.name else ""
    return f"{span.name}: {reason}" if reason else span.name


def _span_owner(span: TracedSpan) -> str:
    return span.client or str(span.attributes.get("service", "")).removeprefix("fedbus-")


def _has_failed(span: TracedSpan) -> bool:
    return bool(span.attributes.get("failed")) or span.status is SpanStatus.CUT_OFF


def _span_style(span: TracedSpan) -> str:
    if _has_failed(span):
        return "red"
    if "→" in span.name:
        return "bold green"
    if span.name == "round":
        return "bold"
    return "cyan" if span.name in PHASES else ""


def _render_bar(offset: float, share: float, cells: int, open_end: str) -> str:
    """Draw a bar of at least an eighth of a cell.

    Args:
        offset: Where the bar starts, as a share of the line.
        share: Its length, as a share of the line.
        cells: The width of the line.
        open_end: A mark in place of the last cell; empty: none.

    """
    start = min(int(offset * cells), cells - 1)
    eighths = max(1, round(share * cells * 8))
    full, rest = divmod(min(eighths, (cells - start) * 8), 8)
    bar = "█" * full + (EIGHTHS[rest - 1] if rest else "")
    return " " * start + ((bar[:-1] + open_end) if open_end else bar).ljust(cells - start)


def _truncate(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
