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
    Ending,
    Traced,
    Tree,
    critical_path,
    waits_of_rounds,
)

DEEPEST: Final = 10
"""Steps to the right that are shown; a chain of events is longer."""
NAME_SHARE: Final = 0.42
WHO: Final = 12
TIME: Final = 11
LEAST_BAR: Final = 8
EIGHTHS: Final = "▏▎▍▌▋▊▉█"
OPEN_ENDS: Final = {Ending.UNDER_WAY: "▶", Ending.CUT_OFF: "✗"}
APART: Final = "… "
"""Before what hangs on a step that is not kept here."""
NAMED: Final = 6
"""Of what is under way so much is named."""


class Standing(StrEnum):
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
        return cls(name, max(LEAST_BAR, width - name - WHO - TIME - 4))


def waterfall(tree: Tree, width: int) -> Iterator[Text]:
    """A line for each span."""
    columns = Columns.of(width)
    first = min((span.start for span in tree.by_id.values()), default=0.0)
    last = max((span.end for span in tree.by_id.values()), default=first)
    hot = _on_the_path(tree)
    for depth, span in _downward(tree):
        is_apart = bool(span.parent) and span.parent not in tree.by_id
        name = " " * min(depth, DEEPEST) + (APART if is_apart else "") + label(span)
        yield _line(span, name, columns, first, max(last - first, 1e-9), hot=span.id in hot)


def legend(tree: Tree) -> Iterator[str]:
    """What the marks mean that are in the picture."""
    endings = {span.ending for span in tree.by_id.values()}
    if Ending.UNDER_WAY in endings:
        yield f"{OPEN_ENDS[Ending.UNDER_WAY]} is under way"
    if Ending.CUT_OFF in endings:
        yield f"{OPEN_ENDS[Ending.CUT_OFF]} was cut off: its process ended before it did"
    if any(root.parent for root in tree.roots):
        yield f"{APART}hangs on a step that another machine keeps, or that is not written yet"


def standing(tree: Tree, run: str, *, looked_after: bool) -> Standing:
    """*looked_after*: whether whoever moved the run last still runs."""
    moves = _moves(tree, run)
    if not moves:
        return Standing.UNKNOWN
    if _state(moves[-1]) in RUN.final:
        return Standing.ENDED
    return Standing.UNDER_WAY if looked_after else Standing.LEFT


def headline(tree: Tree, run: str, stands: Standing) -> str:
    """How the run stands and since when: ``mnist-3 is running: 2 min 5 s so far, since 18:14:40``."""
    spans = tree.by_id.values()
    first, last = min(one.start for one in spans), max(one.end for one in spans)
    took = duration(last - first)
    if stands is Standing.UNKNOWN:
        return f"{run}: what this machine has of it, {took}"
    moved = _moves(tree, run)[-1]
    match stands:
        case Standing.UNDER_WAY:
            awaited = RUN.waits[RUN.states(_state(moved))].awaited
            return f"{run} is {_state(moved)}: {took} so far, since {_clock(first)}; it waits for {awaited}"
        case Standing.LEFT:
            heard = f"last heard of at {_clock(last)}, after {took}"
            return f"{run} was left {_state(moved)}: whoever ran it is gone, {heard}"
        case _:
            reason = str(moved.attributes.get("fedbus.reason", ""))
            why = f": {reason}" if reason and _state(moved) != "finished" else ""
            return f"{run} {_state(moved)} after {duration(moved.end - first)}{why}"


def _moves(tree: Tree, run: str) -> list[Traced]:
    """How the run itself moved, in the order of time."""
    moves = [
        span
        for span in tree.by_id.values()
        if span.name.startswith("run ") and "→" in span.name and span.attributes.get("fedbus.run") == run
    ]
    return sorted(moves, key=lambda span: span.start)


def _state(move: Traced) -> str:
    return move.name.rpartition("→ ")[2]


def _clock(when: float) -> str:
    at = datetime.fromtimestamp(when).astimezone()
    today = at.date() == datetime.now().astimezone().date()
    return f"{at:%H:%M:%S}" if today else f"{at:%Y-%m-%d %H:%M:%S}"


def in_words(tree: Tree) -> Iterator[str]:
    """What each round waited for: ``round 3 took 12.0 s: 81 % waiting for c2's upload``; and what is done now."""
    rounds = waits_of_rounds(tree)
    for one in rounds:
        if one.ending is Ending.CUT_OFF:
            yield f"round {one.round} was cut off, last heard of after {duration(one.seconds)}"
            continue
        others = "; ".join(str(wait).replace("waiting for ", "") for wait in one.waits[1:3])
        more = f" ({others})" if others else ""
        took = "took {}" if one.ending is Ending.ENDED else "has taken {} so far"
        yield f"round {one.round} {took.format(duration(one.seconds))}: {str(one).partition(': ')[2]}{more}"
    if not rounds:
        yield "no round has begun"
    if going := sorted(
        tree.under_way, key=lambda span: not span.client
    ):  # the server side waits for the clients
        named = [f"{_whose(span)} for {duration(span.seconds)}" for span in going[:NAMED]]
        rest = [f"{len(going) - NAMED} more"] if len(going) > NAMED else []
        yield f"under way: {', '.join(named + rest)}"


def _whose(span: Traced) -> str:
    what = f"waiting for {ANSWERS}" if span.name == JOIN else PHASES.get(span.name, label(span))
    return f"{span.client}'s {what}" if span.client else what


def duration(seconds: float) -> str:
    """As a person says it: ``4 µs``, ``12 ms``, ``3.2 s``, ``2 min 5 s``."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _downward(tree: Tree) -> Iterator[tuple[int, Traced]]:
    """Every span under what it hangs on, and how deep. A message and what is done for it stand side by side."""
    whole = [root for root in tree.roots if not root.parent]
    apart = [root for root in tree.roots if root.parent]
    todo = [(len(whole[:1]), root) for root in reversed(apart)] + [(0, root) for root in reversed(whole)]
    while todo:
        depth, span = todo.pop()
        yield depth, span
        step = 0 if span.name.startswith(("publish ", "request ")) else 1
        todo += [(depth + step, child) for child in reversed(tree.children(span))]


def _on_the_path(tree: Tree) -> set[str]:
    rounds = [span for span in tree.by_id.values() if span.name == "round"]
    return {stretch.span.id for one in rounds for stretch in critical_path(tree, one)}


def _line(span: Traced, name: str, columns: Columns, first: float, whole: float, *, hot: bool) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    line.append(f"{_cut(name, columns.name):<{columns.name}} ", _style(span))
    line.append(f"{_cut(_who(span), WHO):<{WHO}} ", "dim")
    bar = _bar(
        (span.start - first) / whole, span.seconds / whole, columns.bar, OPEN_ENDS.get(span.ending, "")
    )
    line.append(bar, "bright_yellow" if hot else "red" if _went_wrong(span) else "blue")
    line.append(f" {duration(span.seconds):>{TIME}}", "" if hot else "dim")
    return line


def label(span: Traced) -> str:
    """A span by name, with what tells it from others of that name."""
    if span.name == "round":
        return f"round {span.round}"
    reason = span.attributes.get("fedbus.reason", "") if "→" in span.name else ""
    return f"{span.name}: {reason}" if reason else span.name


def _who(span: Traced) -> str:
    return span.client or str(span.attributes.get("service", "")).removeprefix("fedbus-")


def _went_wrong(span: Traced) -> bool:
    return bool(span.attributes.get("failed")) or span.ending is Ending.CUT_OFF


def _style(span: Traced) -> str:
    if _went_wrong(span):
        return "red"
    if "→" in span.name:
        return "bold green"
    if span.name == "round":
        return "bold"
    return "cyan" if span.name in PHASES else ""


def _bar(offset: float, share: float, cells: int, open_end: str) -> str:
    """From *offset* so long a *share* of the line, in eighths of a cell; never nothing, and *open_end* at the last."""
    begin = min(int(offset * cells), cells - 1)
    eighths = max(1, round(share * cells * 8))
    full, rest = divmod(min(eighths, (cells - begin) * 8), 8)
    bar = "█" * full + (EIGHTHS[rest - 1] if rest else "")
    return " " * begin + ((bar[:-1] + open_end) if open_end else bar).ljust(cells - begin)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
