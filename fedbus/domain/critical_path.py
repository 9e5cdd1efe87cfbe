"""The critical path of a run, computed from the spans of its trace: what each round waited for.

The *reach* of a span is the latest end among the span and its descendants. It may be long after the span's own
end: publishing a message takes a millisecond, and handling it minutes. The path is walked backwards from the
end of a round. At each point it follows the child with the latest reach; time that no child covers belongs to
the span itself. A span with links (a join) starts to count at the last linked span that ended during it. The end
of a span in progress is the current time.

    spans → critical_path(…) → [PathSegment(client c2, upload, 1.2 s), …] → round_waits(…)
        → "81 % waiting for c2's upload"
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Final, TypeAlias

Attribute = str | int | float | bool

ROUND: Final = "round"
PHASES: Final[Mapping[str, str]] = {
    "download": "download",
    "train": "training",
    "evaluate": "evaluation",
    "delay": "delay",
    "upload": "upload",
    "receive": "upload",
    "aggregate": "aggregation",
    "store": "the model repository",
    "swap model": "model swap",
}
"""The phase of a span, by its name. Any other span counts as the bus, or as the ServerApp."""
SAMPLED: Final = "fedbus.sampled"
"""The attribute of the spans of some clients among many, in the trace of a simulation."""
TRAIN: Final = "train"
JOIN: Final = "aggregate"
ANSWER: Final = "answer"
ANSWERS: Final = "the clients' answers"
"""The phase of all clients together, if their own spans are not in this trace store."""
MODE: Final = "fedbus.aggregation.mode"
"""The attribute of a round whose mode is not synchronous: it may end before the messages that it sent are answered."""
DEADLINE: Final = "the deadline"
BUS: Final = "the bus"
SERVER: Final = "the ServerApp"


class SpanStatus(StrEnum):
    """Whether a span has ended."""

    ENDED = "ended"
    OPEN = "in progress"
    CUT_OFF = "cut off"  # the process ended before the span did


@dataclass(frozen=True)
class TracedSpan:
    """One span; times in seconds since any fixed moment.

    The *end* of a span in progress is now; of a span that was cut off, the last sign of life of its process.
    """

    id: str
    name: str
    start: float
    end: float
    parent: str = ""
    links: tuple[str, ...] = ()
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    status: SpanStatus = SpanStatus.ENDED

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
    """A part of the critical path: from *start* to *end* the run waited for *span*."""

    span: TracedSpan
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class WaitShare:
    """The *share* of a round's time, 0 to 1, spent on *activity* of *client*, or of the server side if empty."""

    activity: str
    client: str
    share: float

    def __str__(self) -> str:
        phase = f"{self.client}'s {self.activity}" if self.client else self.activity
        return f"{self.share * 100:.0f} % waiting for {phase}"


@dataclass(frozen=True)
class RoundWaits:
    """A round and its waits, the longest first."""

    round: int
    seconds: float
    waits: tuple[WaitShare, ...]
    status: SpanStatus = SpanStatus.ENDED
    aggregation: str = ""
    """The mode, and the counts and staleness of its updates; empty if the round is synchronous."""

    def __str__(self) -> str:
        return f"round {self.round}: {self.waits[0] if self.waits else 'no time at all'}"


class SpanTree:
    """The spans of one trace as a tree."""

    def __init__(self, spans: Iterable[TracedSpan]) -> None:
        self.by_id = {span.id: span for span in spans}
        self._children: dict[str, list[TracedSpan]] = defaultdict(list)
        self._orphans: dict[str, list[TracedSpan]] = defaultdict(list)
        """The children of spans that are not in the tree, by the id of the missing parent."""
        for span in self.by_id.values():
            self._children[span.parent if span.parent in self.by_id else ""].append(span)
            if span.parent not in self.by_id:
                self._orphans[span.parent].append(span)
        trainings = (one for one in self.by_id.values() if one.name == TRAIN)
        self._trainings = sorted((one for one in trainings if not one.attributes.get(SAMPLED)), key=_end)
        self._reach: dict[str, float] = {}
        for span in self._post_order():
            ends = [self._reach[child.id] for child in self._children[span.id]]
            self._reach[span.id] = max([span.end, *ends])

    @property
    def roots(self) -> list[TracedSpan]:
        """Spans whose parent is not in the tree, by start time."""
        return sorted(self._children[""], key=_start)

    @property
    def open_spans(self) -> list[TracedSpan]:
        """Spans in progress that have no descendant in progress, by start time."""
        open_spans = {span.id: span for span in self.by_id.values() if span.status is SpanStatus.OPEN}
        ancestors = set[str]()
        for span in open_spans.values():
            parent = span.parent
            while parent in self.by_id and parent not in ancestors:
                ancestors.add(parent)
                parent = self.by_id[parent].parent
        return sorted((span for span in open_spans.values() if span.id not in ancestors), key=_start)

    def children(self, span: TracedSpan) -> list[TracedSpan]:
        """Return the children of *span*, by start time."""
        return sorted(self._children[span.id], key=_start)

    def reach(self, span: TracedSpan) -> float:
        """Return the latest end among *span* and its descendants."""
        return self._reach[span.id]

    def arrivals(self, span: TracedSpan) -> list[tuple[float, str]]:
        """Return arrival time and client of each link of *span* whose sender's span is not in the tree."""
        missing = [link for link in span.links if link not in self.by_id]
        return [(one.start, one.client) for link in missing for one in self._orphans[link]]

    def effective_start(self, span: TracedSpan) -> float:
        """Return when *span* had all its inputs: the latest end, during the span, of the spans that it links to.

        An aggregation without links, in a simulation, has the inputs of the trainings that ended during it, unless it
        sent them itself: those are its children, and a part of its time.
        """
        if span.name == JOIN and not span.links:
            ends = [one.end for one in self.trainings_in(span) if one.parent != span.id]
        else:
            ends = [self._reach[link] for link in span.links if link in self._reach]
        return max([span.start, *[end for end in ends if span.start <= end <= span.end]])

    def trainings_in(self, span: TracedSpan) -> list[TracedSpan]:
        """Return the trainings of the whole trace that ended during *span*, by their end."""
        first = bisect_right(self._trainings, span.start, key=_end)
        last = bisect_right(self._trainings, span.end, key=_end)
        return self._trainings[first:last]

    def _post_order(self) -> list[TracedSpan]:
        """Return every span once, children before their parent. A cycle of parents (invalid input) is left out."""
        order, stack = [], list(self._children[""])
        while stack:
            span = stack.pop()
            order.append(span)
            stack += self._children[span.id]
        return order[::-1]


ChildrenOf: TypeAlias = Callable[[SpanTree, TracedSpan], list[TracedSpan]]


def critical_path(tree: SpanTree, span: TracedSpan) -> list[PathSegment]:
    """Compute the critical path of *span*: contiguous segments from its start to its end."""
    if MODE not in span.attributes:
        return _walk_backwards(tree, span, _latest_first)[::-1]
    path = _walk_backwards(tree, span, partial(_answered_first, round_span=span))[::-1]
    inside = [segment for segment in path if segment.end > span.start]
    return [replace(segment, start=max(segment.start, span.start)) for segment in inside]


def describe_aggregation(span: TracedSpan) -> str:
    """Describe the updates of a round: ``buffered: 10 updates, 3 late``; empty if it is synchronous."""
    if MODE not in span.attributes:
        return ""

    def count(name: str) -> int:
        return int(span.attributes.get(f"fedbus.aggregation.{name}", 0))

    updates = count("updates")
    parts = [
        f"{updates} update{'s' * (updates != 1)}",
        f"{count('late_merged')} late" * bool(count("late_merged")),
        f"{count('late_dropped')} dropped" * bool(count("late_dropped")),
        f"staleness up to {count('max_staleness')}" * bool(count("max_staleness")),
    ]
    return f"{span.attributes[MODE]}: {', '.join(filter(None, parts))}"


def _walk_backwards(tree: SpanTree, top: TracedSpan, children_of: ChildrenOf) -> list[PathSegment]:
    """Walk the path from the end, without recursion: a chain of messages may exceed Python's recursion limit."""
    path: list[PathSegment] = []
    stack = [(top, iter(children_of(tree, top)), top.start)]
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
        stack.append((child, iter(children_of(tree, child)), tree.effective_start(child)))
    return path


def _latest_first(tree: SpanTree, span: TracedSpan) -> list[TracedSpan]:
    """Return the children of *span*, without the sampled ones: the clients that are not recorded count as much."""
    children = (child for child in tree.children(span) if not child.attributes.get(SAMPLED))
    return sorted(children, key=tree.reach, reverse=True)


def _answered_first(tree: SpanTree, span: TracedSpan, *, round_span: TracedSpan) -> list[TracedSpan]:
    """Return the children of *span*, the latest first, on the path of a round that does not wait for all messages.

    The round waited for the messages that ended in it: its own, and those of other rounds whose answers it took.
    """
    if span.name == JOIN:
        return []  # its messages are those of the round
    if span is not round_span:
        return _latest_first(tree, span)
    own = tree.children(span)
    joins = [span, *(child for child in own if child.name == JOIN)]
    taken = [tree.by_id[link] for join in joins for link in join.links if link in tree.by_id]
    messages = [message for one in taken if (message := _message_of(tree, one)) is not None]
    if not any(join.links for join in joins):
        messages = tree.trainings_in(span)
    sent = [child for join in joins[1:] for child in tree.children(join)]
    candidates = {one.id: one for one in (*own, *sent, *messages)}.values()
    ended = [one for one in candidates if one.name == JOIN or tree.reach(one) <= span.end]
    # messages below a join may end long after it
    order = sorted(ended, key=lambda one: one.end if one.name == JOIN else tree.reach(one), reverse=True)
    return [one for one in order if not one.attributes.get(SAMPLED)]


def _message_of(tree: SpanTree, span: TracedSpan) -> TracedSpan | None:
    """Return the ancestor of *span* that a round or its aggregation sent; None if no round is in the tree."""
    below: TracedSpan | None = None
    for one in _ancestors(tree, span):
        if one.name in {ROUND, JOIN}:
            return below
        below = one
    return None


def round_waits(tree: SpanTree) -> list[RoundWaits]:
    """Compute for every round of the trace what it waited for."""
    rounds = [span for span in tree.by_id.values() if span.name == ROUND and span.round is not None]
    return [_waits_of_round(tree, span) for span in sorted(rounds, key=_start)]


def _waits_of_round(tree: SpanTree, span: TracedSpan) -> RoundWaits:
    whole = span.seconds
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for segment in critical_path(tree, span):
        for part, seconds in _attribute_segment(tree, segment):
            spent[part] += seconds
    if span.attributes.get(MODE) == "deadline" and _has_unanswered(tree, span):
        spent[DEADLINE, ""] = spent.pop((PHASES[JOIN], ""), 0.0)
    shares = [
        WaitShare(what, client, seconds / whole) for (what, client), seconds in spent.items() if whole > 0
    ]
    waits = sorted(shares, key=lambda one: (-one.share, one.activity, one.client))
    return RoundWaits(span.round or 0, whole, tuple(waits), span.status, describe_aggregation(span))


def _has_unanswered(tree: SpanTree, span: TracedSpan) -> bool:
    """Return whether a client trained beyond the end of the round that sent the message."""
    todo = [span]
    while todo:
        for child in tree.children(todo.pop()):
            if child.name == TRAIN and child.end > span.end:
                return True
            todo.append(child)
    return False


def _attribute_segment(tree: SpanTree, segment: PathSegment) -> Iterator[tuple[tuple[str, str], float]]:
    """Attribute the time of *segment* to phases and clients.

    Until the last reply arrived, a span that joins replies waited for the client of that reply.
    """
    span = segment.span
    arrived, client = max(tree.arrivals(span), default=(segment.start, ""))
    if span.status is SpanStatus.OPEN and span.name == JOIN:
        arrived, client = segment.end, ""  # its links are recorded when it ends
    waited_until = min(max(arrived, segment.start), segment.end)
    if waited_until > segment.start:
        yield (ANSWER if client else ANSWERS, client), waited_until - segment.start
    if segment.end > waited_until:
        yield _part_of(tree, span), segment.end - waited_until


def _part_of(tree: SpanTree, span: TracedSpan) -> tuple[str, str]:
    """Return the phase and the client of *span*: its own, else those of its nearest ancestor that has a phase."""
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


def _end(span: TracedSpan) -> float:
    return span.end


def _start(span: TracedSpan) -> tuple[float, str]:
    return span.start, span.id
