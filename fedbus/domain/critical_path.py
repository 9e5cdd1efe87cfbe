"""What a run waited for: the critical path through its trace, by plain arithmetic over spans.

A span's *reach* is the end of the last thing that hangs on it, which may be long after its own: a message
is published in a millisecond, and what is done for it lasts minutes. Walked backwards from the end of a
round, the path is always in that child whose reach came last; what no child covers is the span's own. Where
spans join (links), the path goes on before the last of them that came. Of what is under way the end is now,
and what is said of it holds so far.

    spans → critical_path(…) → [Stretch(client c2, upload, 1.2 s), …] → waits_of_rounds → "81 % waiting for c2's upload"
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

Attribute = str | int | float | bool

ROUND: Final = "round"
PHASES: Final[Mapping[str, str]] = {
    "download": "download",
    "train": "training",
    "evaluate": "evaluation",
    "upload": "upload",
    "receive": "upload",
    "aggregate": "aggregation",
    "store": "the model repository",
    "swap model": "model swap",
}
"""What a span is a part of, in words. All that is not named here is the bus, or the ServerApp itself."""
JOIN: Final = "aggregate"
ANSWER: Final = "answer"
ANSWERS: Final = "the clients' answers"
"""Where what the clients did is told on their own machines."""
BUS: Final = "the bus"
SERVER: Final = "the ServerApp"


class SpanStatus(StrEnum):
    """How a span stands."""

    ENDED = "ended"
    UNDER_WAY = "under way"
    CUT_OFF = "cut off"  # its process ended before it did


@dataclass(frozen=True)
class TracedSpan:
    """One span, as far as this module wants to know it; times in seconds since whenever.

    The *end* of one that has none is now, or the last that was heard of its process.
    """

    id: str
    name: str
    start: float
    end: float
    parent: str = ""
    links: tuple[str, ...] = ()
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    ending: SpanStatus = SpanStatus.ENDED

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def client(self) -> str:
        return str(self.attributes.get("fedbus.client", ""))

    @property
    def round(self) -> int | None:
        number = self.attributes.get("fedbus.round")
        return number if isinstance(number, int) else None


@dataclass(frozen=True)
class PathSegment:
    """A part of the critical path: from *start* to *end* the run waited for this *span*."""

    span: TracedSpan
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class WaitShare:
    """What a round waited for: *share* of its time, 0 to 1, for *what* of *client*, or of the server side."""

    what: str
    client: str
    share: float

    def __str__(self) -> str:
        whose = f"{self.client}'s {self.what}" if self.client else self.what
        return f"{self.share * 100:.0f} % waiting for {whose}"


@dataclass(frozen=True)
class RoundWaits:
    """A round, and what it waited for, the longest first."""

    round: int
    seconds: float
    waits: tuple[WaitShare, ...]
    ending: SpanStatus = SpanStatus.ENDED

    def __str__(self) -> str:
        return f"round {self.round}: {self.waits[0] if self.waits else 'no time at all'}"


class SpanTree:
    """The spans of one trace, by what hangs on what."""

    def __init__(self, spans: Iterable[TracedSpan]) -> None:
        self.by_id = {span.id: span for span in spans}
        self._children: dict[str, list[TracedSpan]] = defaultdict(list)
        self._apart: dict[str, list[TracedSpan]] = defaultdict(list)
        """What hangs on a span that is not here, by that one's id."""
        for span in self.by_id.values():
            self._children[span.parent if span.parent in self.by_id else ""].append(span)
            if span.parent not in self.by_id:
                self._apart[span.parent].append(span)
        self._reach: dict[str, float] = {}
        for span in self._leaves_first():
            ends = [self._reach[child.id] for child in self._children[span.id]]
            self._reach[span.id] = max([span.end, *ends])

    @property
    def roots(self) -> list[TracedSpan]:
        """Those without a parent here, the first first."""
        return sorted(self._children[""], key=_start)

    @property
    def under_way(self) -> list[TracedSpan]:
        """What is being done now: each span under way on which none hangs, at whatever depth, that is, too."""
        going = {span.id: span for span in self.by_id.values() if span.ending is SpanStatus.UNDER_WAY}
        above = set[str]()
        for span in going.values():
            parent = span.parent
            while parent in self.by_id and parent not in above:
                above.add(parent)
                parent = self.by_id[parent].parent
        return sorted((span for span in going.values() if span.id not in above), key=_start)

    def children(self, span: TracedSpan) -> list[TracedSpan]:
        """What hangs on *span*, in the order of beginning."""
        return sorted(self._children[span.id], key=_start)

    def reach(self, span: TracedSpan) -> float:
        """When the last of all that hangs on *span* ended."""
        return self._reach[span.id]

    def arrivals(self, span: TracedSpan) -> list[tuple[float, str]]:
        """When what *span* joins came, and from whom, where the senders' own spans are not here."""
        absent = [link for link in span.links if link not in self.by_id]
        return [(one.start, one.client) for link in absent for one in self._apart[link]]

    def began(self, span: TracedSpan) -> float:
        """When *span* had what it was waiting for: the last of what it joins that came while it lasted."""
        came = [self._reach[link] for link in span.links if link in self._reach]
        return max([span.start, *[end for end in came if span.start <= end <= span.end]])

    def _leaves_first(self) -> list[TracedSpan]:
        """Every span once, each behind its children; a ring of parents, which no honest sender makes, is left out."""
        order, todo = [], list(self._children[""])
        while todo:
            span = todo.pop()
            order.append(span)
            todo += self._children[span.id]
        return order[::-1]


def critical_path(tree: SpanTree, span: TracedSpan) -> list[PathSegment]:
    """What *span* waited for from its end back to its beginning, in the order of time."""
    return _walk_backwards(tree, span)[::-1]


def _walk_backwards(tree: SpanTree, top: TracedSpan) -> list[PathSegment]:
    """Without recursion: a chain of messages may be longer than Python's stack."""
    path: list[PathSegment] = []
    stack = [(top, iter(_latest_first(tree, top)), top.start)]
    cursor = top.end
    while stack:
        span, children, began = stack[-1]
        child = next((one for one in children if began < tree.reach(one) and one.start < cursor), None)
        if child is None:
            if cursor > began:
                path.append(PathSegment(span, began, cursor))
            cursor = min(cursor, began)
            stack.pop()
            continue
        end = min(tree.reach(child), cursor)
        if cursor > end:
            path.append(PathSegment(span, end, cursor))
        cursor = end
        stack.append((child, iter(_latest_first(tree, child)), tree.began(child)))
    return path


def _latest_first(tree: SpanTree, span: TracedSpan) -> list[TracedSpan]:
    return sorted(tree.children(span), key=tree.reach, reverse=True)


def round_waits(tree: SpanTree) -> list[RoundWaits]:
    """Every round of the trace, and what it waited for."""
    rounds = [span for span in tree.by_id.values() if span.name == ROUND and span.round is not None]
    return [_waits_of_round(tree, span) for span in sorted(rounds, key=_start)]


def _waits_of_round(tree: SpanTree, span: TracedSpan) -> RoundWaits:
    whole = span.seconds
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for stretch in critical_path(tree, span):
        for part, seconds in _attribute_segment(tree, stretch):
            spent[part] += seconds
    shares = [
        WaitShare(what, client, seconds / whole) for (what, client), seconds in spent.items() if whole > 0
    ]
    waits = sorted(shares, key=lambda one: (-one.share, one.what, one.client))
    return RoundWaits(span.round or 0, whole, tuple(waits), span.ending)


def _attribute_segment(tree: SpanTree, stretch: PathSegment) -> Iterator[tuple[tuple[str, str], float]]:
    """To whom it is put down. Until the last reply was there, what joins replies waited for whom it came from."""
    span = stretch.span
    arrived, client = max(tree.arrivals(span), default=(stretch.start, ""))
    if span.ending is SpanStatus.UNDER_WAY and span.name == JOIN:
        arrived, client = stretch.end, ""  # which have come is told when it ends
    waited_until = min(max(arrived, stretch.start), stretch.end)
    if waited_until > stretch.start:
        yield (ANSWER if client else ANSWERS, client), waited_until - stretch.start
    if stretch.end > waited_until:
        yield _part_of(tree, span), stretch.end - waited_until


def _part_of(tree: SpanTree, span: TracedSpan) -> tuple[str, str]:
    """Which phase *span* belongs to, and whose: its own, or that of the first above it that has one."""
    for one in _ancestors(tree, span):
        if one.name in PHASES:
            return PHASES[one.name], one.client
        if one.name == ROUND:
            return SERVER if one is span else BUS, ""
    return BUS, ""


def _ancestors(tree: SpanTree, span: TracedSpan) -> Iterator[TracedSpan]:
    one: TracedSpan | None = span
    while one is not None:
        yield one
        one = tree.by_id.get(one.parent)


def _start(span: TracedSpan) -> tuple[float, str]:
    return span.start, span.id
