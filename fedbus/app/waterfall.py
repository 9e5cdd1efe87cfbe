"""A trace as a person reads it in a terminal: who did what, when, for how long, and what was waited for.

    run • → requested            scheduler   ▕━                            ▏   4 ms
     publish open_run            …

Whatever hangs on something stands below it, one step to the right, in the order of time. What the
rounds waited for is bright, all else dim, failures are red. It fits in 60 columns and grows with the terminal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rich.text import Text

from fedbus.domain.critical_path import PHASES, Traced, Tree, critical_path, waits_of_rounds

DEEPEST: Final = 10
"""Steps to the right that are shown; a chain of events is longer."""
NAME_SHARE: Final = 0.42
WHO: Final = 12
TIME: Final = 8
LEAST_BAR: Final = 8
EIGHTHS: Final = "▏▎▍▌▋▊▉█"


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
        yield _line(span, depth, columns, first, max(last - first, 1e-9), hot=span.id in hot)


def in_words(tree: Tree) -> Iterator[str]:
    """What each round waited for: ``round 3 took 12.0 s: 81 % waiting for c2's upload``."""
    for one in waits_of_rounds(tree):
        others = "; ".join(str(wait).replace("waiting for ", "") for wait in one.waits[1:3])
        more = f" ({others})" if others else ""
        yield f"round {one.round} took {duration(one.seconds)}: {str(one).partition(': ')[2]}{more}"


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
    todo = [(0, root) for root in reversed(tree.roots)]
    while todo:
        depth, span = todo.pop()
        yield depth, span
        step = 0 if span.name.startswith(("publish ", "request ")) else 1
        todo += [(depth + step, child) for child in reversed(tree.children(span))]


def _on_the_path(tree: Tree) -> set[str]:
    rounds = [span for span in tree.by_id.values() if span.name == "round"]
    return {stretch.span.id for one in rounds for stretch in critical_path(tree, one)}


def _line(span: Traced, depth: int, columns: Columns, first: float, whole: float, *, hot: bool) -> Text:
    style = _style(span)
    name = _cut(" " * min(depth, DEEPEST) + label(span), columns.name)
    line = Text(no_wrap=True, overflow="crop")
    line.append(f"{name:<{columns.name}} ", style)
    line.append(f"{_cut(_who(span), WHO):<{WHO}} ", "dim")
    line.append(
        _bar((span.start - first) / whole, (span.end - span.start) / whole, columns.bar),
        "bright_yellow" if hot else "red" if span.attributes.get("failed") else "blue",
    )
    line.append(f" {duration(span.end - span.start):>{TIME}}", "" if hot else "dim")
    return line


def label(span: Traced) -> str:
    """A span by name, with what tells it from others of that name."""
    if span.name == "round":
        return f"round {span.round}"
    reason = span.attributes.get("fedbus.reason", "") if "→" in span.name else ""
    return f"{span.name}: {reason}" if reason else span.name


def _who(span: Traced) -> str:
    return span.client or str(span.attributes.get("service", "")).removeprefix("fedbus-")


def _style(span: Traced) -> str:
    if span.attributes.get("failed"):
        return "red"
    if "→" in span.name:
        return "bold green"
    if span.name == "round":
        return "bold"
    return "cyan" if span.name in PHASES else ""


def _bar(offset: float, share: float, cells: int) -> str:
    """From *offset* so long a *share* of the line, in eighths of a cell; never nothing."""
    begin = min(int(offset * cells), cells - 1)
    eighths = max(1, round(share * cells * 8))
    full, rest = divmod(min(eighths, (cells - begin) * 8), 8)
    return " " * begin + ("█" * full + (EIGHTHS[rest - 1] if rest else "")).ljust(cells - begin)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
