"""Lifecycles on the bus: the log is the state.

A transition is one message on the thing's own subject, and the stream takes it only if
nobody has moved that thing since (``Nats-Expected-Last-Subject-Sequence``). So the last
message is the state, a second owner is refused, and a restarted owner reads one message and
goes on.

Two ways to move, chosen by who could own the thing:

- with an *outbox*: a thing with one possible owner (a client, its FL client, its inference
  agent) moves at once, even when cut off; its transitions wait in the outbox, in order,
  until the bus takes them.
- without: what several could own (a server, a run) has moved only when the bus says so.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

import structlog

from fedbus.bus import tracing
from fedbus.bus.beside import beside
from fedbus.bus.bus import Bus
from fedbus.bus.errors import MovedByAnother, PublishRefused
from fedbus.contracts import subjects
from fedbus.contracts.envelope import envelop, pack, read
from fedbus.contracts.lifecycle import Lifecycle, span_name
from fedbus.contracts.message import Facts
from fedbus.contracts.signals import TRANSITIONS, add, failed, tracer_of
from fedbus.contracts.transition import Transition

EXPECTED = "Nats-Expected-Last-Subject-Sequence"
WRONG_SEQUENCE = "(10071)"

State = TypeVar("State", bound=StrEnum)
FactsT = TypeVar("FactsT", bound=Facts)

tracer = tracer_of("fedbus.lives")
log = structlog.get_logger("fedbus.lives")


class Entry(Protocol):
    """One message that waits in an outbox."""

    @property
    def number(self) -> int: ...
    @property
    def subject(self) -> str: ...
    @property
    def headers(self) -> dict[str, str]: ...
    @property
    def body(self) -> bytes: ...


class Outbox(Protocol):
    """Keeps messages in order, on disk, until they are removed. See `fedbus.stores.outbox`."""

    def append(self, subject: str, headers: dict[str, str], body: bytes) -> int: ...
    def first(self) -> Entry | None: ...
    def last(self, subject: str) -> Entry | None: ...
    def remove(self, number: int) -> None: ...


class Life(Generic[State, FactsT]):
    """One thing's lifecycle, as its owner moves it. Make one with `Lives.of`."""

    def __init__(
        self,
        lives: "Lives",
        lifecycle: Lifecycle[State, Any, FactsT, Any],
        facts: FactsT,
        state: State | None,
        told: str = "",
    ) -> None:
        self._lives = lives
        self._lifecycle = lifecycle
        self._state = state
        self.facts = facts
        self.event = ""
        """What has last happened to it."""
        self.reason = ""
        self.told = told
        """The id of the message that said so."""

    @property
    def state(self) -> State:
        """Where it stands. A thing that was never told of stands in its first state."""
        return self._state or self._lifecycle.initial

    @property
    def born(self) -> bool:
        return self._state is not None

    def allows(self, event: str) -> bool:
        return self._lifecycle.allows(self.state, event)

    async def bear(self, event: str, *, reason: str = "") -> None:
        """Tell of a thing that is new: it stands in its first state."""
        assert not self.born
        await self._tell(event, "", self._lifecycle.initial, reason, run=getattr(self.facts, "run", None))

    async def move(
        self, event: str, *, reason: str = "", deadline: datetime | None = None, **facts: Any
    ) -> None:
        """Follow the arrow of *event*, with *facts* changed.

        Raises IllegalTransition where the table has no such arrow, and MovedByAnother where somebody
        else has moved this thing since.
        """
        target = self._lifecycle.advance(self.state, event)
        run = facts.get("run") or self._run_in_hand
        self.facts = self.facts.model_copy(update=facts)
        trouble = str(facts.get("trouble") or event) if event in self._lifecycle.failures else ""
        await self._tell(event, str(self.state), target, reason, deadline, run=run, trouble=trouble)

    @property
    def _run_in_hand(self) -> str | None:
        """The run that it is in, where it is in one and does not merely remember it."""
        is_in_one = self.state not in self._lifecycle.between_runs
        return getattr(self.facts, "run", None) if is_in_one else None

    async def _tell(
        self,
        event: str,
        source: str,
        target: State,
        reason: str,
        deadline: datetime | None = None,
        *,
        run: str | None = None,
        trouble: str = "",
    ) -> None:
        wait = self._lifecycle.waits.get(target)
        transition = Transition.model_validate(
            {
                "task": self.facts.task,
                "event": event,
                "source": source,
                "target": str(target),
                "reason": reason,
                "waits_for": wait.awaited if wait else "",
                "deadline": deadline,
                "facts": self.facts.model_dump(),
            }
        )
        with tracer.start_as_current_span(
            span_name(transition.kind, source or "•", str(target)), attributes=_attributes(transition, run)
        ) as span:
            if trouble:
                failed(span, trouble, reason)
            waited = source in self._lifecycle.waits  # then its own clock may have moved it
            self.told = await self._lives.tell(transition, cause=self.told if waited else "")
        moved = {"fedbus.kind": transition.kind, "fedbus.from": source, "fedbus.to": str(target)}
        add(TRANSITIONS, moved)
        self._state = target
        self.event, self.reason = event, reason
        say = (
            log.debug if source == str(target) else log.info
        )  # a round further is in the trace and the event
        say(
            span_name(transition.kind, source or "•", str(target)),
            thing=transition.thing,
            event_word=event,
            reason=reason or None,
        )


class Lives:
    """The lifecycles that one agent owns."""

    def __init__(self, bus: Bus, outbox: Outbox | None = None) -> None:
        self._bus = bus
        self._outbox = outbox
        self._sequences: dict[str, int] = {}
        self._waiting = asyncio.Event()
        self._said = asyncio.Event()
        self._said.set()

    @classmethod
    @asynccontextmanager
    async def open(cls, bus: Bus, outbox: Outbox | None = None) -> AsyncIterator["Lives"]:
        """The agent's lifecycles for as long as the block runs; what still waits in the outbox stays there."""
        lives = cls(bus, outbox)
        if outbox is None:
            yield lives
            return
        await lives._drop_what_was_overtaken(outbox)
        async with beside(lives._empty(outbox), name="empty the outbox"):
            yield lives
            await lives._say_the_rest()

    async def of(self, lifecycle: Lifecycle[State, Any, FactsT, Any], facts: FactsT) -> Life[State, FactsT]:
        """The life of the thing that *facts* names, as the log tells it; with *facts* where it tells nothing."""
        subject = self._subject(lifecycle.kind, facts.thing)
        told = await self._told(subject)
        if told is None:
            return Life(self, lifecycle, facts, None)
        last, said_in = told
        known = type(facts).model_validate(last.facts.model_dump())
        life = Life(self, lifecycle, known, lifecycle.states(last.target), said_in)
        life.event, life.reason = last.event, last.reason
        return life

    async def tell(self, transition: Transition, *, cause: str = "") -> str:
        """Append *transition* to the log: at once by the outbox, or when the bus has taken it. The message's id.

        *cause*: what led to it, where nothing is being handled.
        """
        subject = self._subject(transition.kind, transition.thing)
        envelope = envelop(transition, source=self._bus.source, trace=tracing.here(), cause=cause)
        headers, body = envelope.headers(), pack(transition)
        if self._outbox is None:
            await self._store(subject, headers, body)
        else:
            self._outbox.append(subject, headers, body)
            self._said.clear()
            self._waiting.set()
        return envelope.id

    async def _told(self, subject: str) -> tuple[Transition, str] | None:
        """The last transition and its id: what still waits in the outbox is newer than what the stream has."""
        seen = await self._bus.last(subject)
        told_until = self._sequences.get(subject, 0)  # the outbox may have been quicker than this answer
        self._sequences[subject] = max(told_until, seen.sequence if seen else 0)
        entry = self._outbox.last(subject) if self._outbox else None
        if entry is not None:
            envelope, message = read(entry.subject, entry.headers, entry.body)
            assert isinstance(message, Transition)
            return message, envelope.id
        if seen is None:
            return None
        assert isinstance(seen.message, Transition)
        return seen.message, seen.envelope.id

    async def _empty(self, outbox: Outbox) -> None:
        """Hand the bus what waits, in order, and wait for more."""
        while True:
            while (entry := outbox.first()) is not None:
                try:
                    await self._store(entry.subject, entry.headers, entry.body)
                except MovedByAnother:
                    _drop(outbox, entry.subject)
                    raise
                outbox.remove(entry.number)
            self._said.set()
            await self._waiting.wait()
            self._waiting.clear()

    async def _drop_what_was_overtaken(self, outbox: Outbox) -> None:
        """Another owner may have moved the thing while we were away: then what we would say is of the past."""
        if (entry := outbox.first()) is None:
            return
        seen = await self._bus.last(entry.subject)
        _, waiting = read(entry.subject, entry.headers, entry.body)
        assert isinstance(waiting, Transition)
        stands = getattr(seen.message, "target", "") if seen else ""
        said_already = seen is not None and seen.envelope.id == entry.headers["ce-id"]
        if waiting.source != stands and not said_already:
            log.warning("what waited in the outbox was overtaken by another owner", thing=waiting.thing)
            _drop(outbox, entry.subject)

    async def _say_the_rest(self, within_s: float = 2.0) -> None:
        """On leaving, a moment for what waits; if the bus is away it is said after the next start."""
        try:
            async with asyncio.timeout(within_s):
                await self._said.wait()
        except TimeoutError:
            log.warning("transitions wait in the outbox for the next start")

    async def _store(self, subject: str, headers: dict[str, str], body: bytes) -> None:
        if subject not in self._sequences:
            seen = await self._bus.last(subject)
            self._sequences[subject] = seen.sequence if seen else 0
        expected = {EXPECTED: str(self._sequences[subject])}
        try:
            self._sequences[subject] = await self._bus.store(subject, headers | expected, body)
        except PublishRefused as refused:
            if WRONG_SEQUENCE not in str(refused):
                raise
            self._sequences[subject] = await self._ours(subject, headers["ce-id"])

    async def _ours(self, subject: str, ce_id: str) -> int:
        """The sequence of our own message, where a lost acknowledgement made us say it twice."""
        seen = await self._bus.last(subject)
        if seen is None or seen.envelope.id != ce_id:
            kind, thing = subject.split(".life.", 1)[1].split(".", 1)
            raise MovedByAnother(kind, thing)
        return seen.sequence

    def _subject(self, kind: str, thing: str) -> str:
        return subjects.life(self._bus.fed, kind, thing)


def _drop(outbox: Outbox, subject: str) -> None:
    """Let go of what waits to be said on *subject*: whoever it is about has another owner now."""
    while (entry := outbox.first()) is not None and entry.subject == subject:
        outbox.remove(entry.number)


def _attributes(transition: Transition, run: str | None) -> dict[str, str | int]:
    facts = vars(transition.facts)
    attributes: dict[str, str | int] = {
        "fedbus.kind": transition.kind,
        "fedbus.thing": transition.thing,
        "fedbus.task": transition.task,
        "fedbus.event": transition.event,
        "fedbus.from": transition.source,
        "fedbus.to": transition.target,
        "fedbus.reason": transition.reason,
    }
    if run:
        attributes["fedbus.run"] = run
    if client := facts.get("client"):
        attributes["fedbus.client"] = client
    if number := facts.get("round"):
        attributes["fedbus.round"] = number
    if model := facts.get("model"):
        attributes["fedbus.model.version"] = model.version
    if code := facts.get("code_version"):
        attributes["fedbus.code.version"] = code
    return attributes
