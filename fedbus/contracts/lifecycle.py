"""Lifecycles as tables.

A lifecycle is a set of arrows: in this state, on this event, go to that state. A second table lists the data
that each event may change. The checks of transitions and changes, the diagrams of the documentation, the
names of the spans and the random walks of the tests are derived from both tables.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from pydantic import ValidationError

from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.message import LifecycleData

State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)
Data = TypeVar("Data", bound=LifecycleData)
Changes = TypeVar("Changes", bound=Mapping[str, object])
"""A ``TypedDict(total=False)`` of the fields of the data that a transition may change."""

NO_CHANGES: Final[Any] = MappingProxyType({})


class IllegalTransition(Exception):
    """An event occurred in a state that has no arrow for it, because of a bug or a stale sender."""

    def __init__(self, kind: str, state: str, event: str) -> None:
        super().__init__(f"{kind}: {event} is not possible in state {state}")
        self.kind = kind
        self.state = state
        self.event = event


class IllegalChange(Exception):
    """A transition changes a field that it may not change, or sets a wrong type. It is a bug of the owner."""

    def __init__(self, kind: str, event: str, reason: str) -> None:
        super().__init__(f"{kind}: event {event} {reason}")
        self.kind = kind
        self.event = event
        self.reason = reason


class Wait(NamedTuple):
    """What a state waits for, and the setting that limits the wait, both as text."""

    waiting_for: str
    deadline: str


class Arrow(NamedTuple, Generic[State, Event]):
    source: State
    event: Event
    target: State


@dataclass(frozen=True)
class Lifecycle(Generic[State, Event, Data, Changes]):
    kind: str
    owner: AgentName
    """The only agent that publishes its transitions."""
    initial: State
    creation: Event
    """The event of the first transition, which leads from nothing to *initial*."""
    data: type[Data]
    arrows: Mapping[tuple[State, Event], State]
    changes: Mapping[Event, AbstractSet[str]]
    """The fields of *data* that each event may change; an event that is not listed changes none."""
    waits: Mapping[State, Wait] = field(default_factory=dict)
    failure_events: AbstractSet[Event] = frozenset()
    """The events that report a failure."""
    between_runs: AbstractSet[State] = frozenset()
    """The states in which the run in the data is the last one, not an active one."""

    def advance(self, state: State, event: Event) -> State:
        """Return the state that *event* leads to from *state*.

        Raises:
            IllegalTransition: The table has no arrow for *event* in *state*.

        """
        try:
            return self.arrows[state, event]
        except KeyError:
            raise IllegalTransition(self.kind, state, event) from None

    def allows(self, state: State, event: Event) -> bool:
        return (state, event) in self.arrows

    def change(self, event: Event, data: Data, changes: Changes) -> Data:
        """Apply *changes* to *data* after checking them.

        Raises:
            IllegalChange: A key of *changes* is not a field of the data or may not change on *event*, or a
                value has the wrong type.

        """
        if not changes:
            return data
        allowed = self.changes.get(event, frozenset())
        for name in changes:
            if name not in type(data).model_fields:
                raise IllegalChange(self.kind, event, f"changes {name}, which is not a field of the data")
            if name not in allowed:
                raise IllegalChange(
                    self.kind,
                    event,
                    f"may not change {name}; it may change: {', '.join(sorted(allowed)) or 'nothing'}",
                )
        try:
            return type(data).model_validate({**dict(data), **changes}, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise IllegalChange(self.kind, event, f"sets {where} to a wrong value: {first['msg']}") from None

    def __iter__(self) -> Iterator[Arrow[State, Event]]:
        return (Arrow(source, event, target) for (source, event), target in self.arrows.items())

    @property
    def states(self) -> type[State]:
        return type(self.initial)

    @property
    def events(self) -> type[Event]:
        return type(self.creation)

    @property
    def final(self) -> frozenset[State]:
        """The states that no arrow leaves."""
        return frozenset(self.arrows.values()) - {source for source, _ in self.arrows}

    def mermaid(self) -> str:
        """Return the table as a Mermaid state diagram."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial}"]
        lines += [f"    {arrow.source} --> {arrow.target}: {arrow.event}" for arrow in self]
        lines += [f"    {state} --> [*]" for state in sorted(self.final)]
        return "\n".join(lines) + "\n"


AnyLifecycle: TypeAlias = Lifecycle[Any, Any, Any, Any]


def span_name(kind: str, source: str, target: str) -> str:
    """Return the name of a transition's span: ``server recruiting → training``."""
    return f"{kind} {source} → {target}"
