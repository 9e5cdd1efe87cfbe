"""Lifecycles written as tables.

A lifecycle is a set of arrows: in this state, on this event, go to that state. Whatever
else we want to know about it is read off the arrows: whether an event is legal now, the
diagram in the documentation, the names of the spans, the walks that the tests take.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

State = TypeVar("State", bound=StrEnum)


class IllegalTransition(Exception):
    """An event came in a state that has no arrow for it: a bug, or a stale sender."""

    def __init__(self, kind: str, state: str, event: str) -> None:
        super().__init__(f"{kind}: {event} is not possible in state {state}")
        self.kind = kind
        self.state = state
        self.event = event


class Wait(NamedTuple):
    """What a state waits for, and the setting that bounds the waiting."""

    awaited: str
    deadline: str


class Arrow(NamedTuple, Generic[State]):
    source: State
    event: str
    target: State


@dataclass(frozen=True)
class Lifecycle(Generic[State]):
    kind: str
    owner: str
    """The agent that moves it; nobody else does."""
    initial: State
    arrows: Mapping[tuple[State, str], State]
    waits: Mapping[State, Wait] = field(default_factory=dict)
    failures: frozenset[str] = frozenset()
    """The events that say that something went wrong."""
    between_runs: frozenset[State] = frozenset()
    """The states in which a run that the facts name is the last one, and no longer the one that it is in."""

    def advance(self, state: State, event: str) -> State:
        """The state that *event* leads to from *state*; raises IllegalTransition where there is no arrow."""
        try:
            return self.arrows[state, event]
        except KeyError:
            raise IllegalTransition(self.kind, state, event) from None

    def allows(self, state: State, event: str) -> bool:
        return (state, event) in self.arrows

    def __iter__(self) -> Iterator[Arrow[State]]:
        return (Arrow(source, event, target) for (source, event), target in self.arrows.items())

    @property
    def states(self) -> type[State]:
        return type(self.initial)

    @property
    def final(self) -> frozenset[State]:
        """The states that no arrow leaves."""
        return frozenset(self.arrows.values()) - {source for source, _ in self.arrows}

    def mermaid(self) -> str:
        """The table as a Mermaid state diagram."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial}"]
        lines += [f"    {arrow.source} --> {arrow.target}: {arrow.event}" for arrow in self]
        lines += [f"    {state} --> [*]" for state in sorted(self.final)]
        return "\n".join(lines) + "\n"


def span_name(kind: str, source: str, target: str) -> str:
    """How the span of a transition is called: ``server recruiting → training``."""
    return f"{kind} {source} → {target}"
