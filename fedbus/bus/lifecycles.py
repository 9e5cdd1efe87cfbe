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
from typing import Generic, Protocol

import structlog

from fedbus.bus import tracing
from fedbus.bus.background import background_task
from fedbus.bus.bus import Bus
from fedbus.bus.errors import PublishRefused, StaleOwner
from fedbus.contracts import subjects
from fedbus.contracts.envelope import decode_message, make_envelope, pack
from fedbus.contracts.lifecycle import NO_CHANGES, Changes, Data, Event, Lifecycle, State, span_name
from fedbus.contracts.telemetry import TRANSITIONS, get_tracer, increment, mark_failed
from fedbus.contracts.transition import Transition

EXPECTED_SEQUENCE_HEADER = "Nats-Expected-Last-Subject-Sequence"
WRONG_SEQUENCE_CODE = "(10071)"

tracer = get_tracer("fedbus.lives")
log = structlog.get_logger("fedbus.lives")


class OutboxEntry(Protocol):
    """One message that waits in an outbox."""

    @property
    def number(self) -> int: ...
    @property
    def subject(self) -> str: ...
    @property
    def headers(self) -> dict[str, str]: ...
    @property
    def body(self) -> bytes: ...


class TransitionOutbox(Protocol):
    """Keeps messages in order, on disk, until they are removed. See `fedbus.stores.outbox`."""

    def append(self, subject: str, headers: dict[str, str], body: bytes) -> int: ...
    def first(self) -> OutboxEntry | None: ...
    def last(self, subject: str) -> OutboxEntry | None: ...
    def remove(self, number: int) -> None: ...


class LifecycleHandle(Generic[State, Event, Data, Changes]):
    """One thing's lifecycle, as its owner moves it. Make one with `Lives.of`."""

    def __init__(
        self,
        lives: "LifecycleStore",
        lifecycle: Lifecycle[State, Event, Data, Changes],
        facts: Data,
        last: Transition | None = None,
        told: str = "",
    ) -> None:
        self._lives = lives
        self._lifecycle = lifecycle
        self._facts = facts
        self._state = lifecycle.states(last.target) if last else None
        self.event: Event | None = lifecycle.events(last.event) if last else None
        """The event of the last transition."""
        self.reason = last.reason if last else ""
        self.last_message_id = told
        """The id of the message that said so."""

    @property
    def state(self) -> State:
        """Where it stands. A thing that was never told of stands in its first state."""
        return self._state or self._lifecycle.initial

    @property
    def facts(self) -> Data:
        """The data of the last transition. Only a transition changes them."""
        return self._facts

    @property
    def born(self) -> bool:
        return self._state is not None

    def allows(self, event: Event) -> bool:
        return self._lifecycle.allows(self.state, event)

    async def create(self, *, reason: str = "") -> None:
        """Publish the creation of a new entity, in its initial state."""
        assert not self.born
        run = getattr(self._facts, "run", None)
        await self._tell(
            self._lifecycle.creation, "", self._lifecycle.initial, self._facts, reason=reason, run=run
        )

    async def transition(
        self,
        event: Event,
        changes: Changes = NO_CHANGES,
        *,
        reason: str = "",
        deadline: datetime | None = None,
    ) -> None:
        """Follow the arrow of *event*, with *changes* of the data.

        State and data change together, when the transition is published; nothing changes where an exception is
        raised.

        Raises:
            IllegalTransition: The table has no such arrow.
            IllegalChange: The table does not allow these changes.
            MovedByAnother: Another owner has moved this entity.

        """
        target = self._lifecycle.advance(self.state, event)
        data = self._lifecycle.change(event, self._facts, changes)
        run = getattr(data, "run", None) if changes.get("run") else self._run_in_hand
        failure = ""
        if event in self._lifecycle.failures:
            failure = str(changes.get("trouble") or event)
        await self._tell(
            event, str(self.state), target, data, reason=reason, deadline=deadline, run=run, failure=failure
        )

    @property
    def _run_in_hand(self) -> str | None:
        """The run that it is in, where it is in one and does not merely remember it."""
        is_in_one = self.state not in self._lifecycle.between_runs
        return getattr(self._facts, "run", None) if is_in_one else None

    async def _tell(
        self,
        event: Event,
        source: str,
        target: State,
        data: Data,
        *,
        reason: str,
        deadline: datetime | None = None,
        run: str | None = None,
        failure: str = "",
    ) -> None:
        wait = self._lifecycle.waits.get(target)
        transition = Transition.model_validate(
            {
                "task": data.task,
                "event": str(event),
                "source": source,
                "target": str(target),
                "reason": reason,
                "waits_for": wait.waiting_for if wait else "",
                "deadline": deadline,
                "facts": data.model_dump(),
            }
        )
        with tracer.start_as_current_span(
            span_name(transition.kind, source or "•", str(target)),
            attributes=_span_attributes(transition, run),
        ) as span:
            if failure:
                mark_failed(span, failure, reason)
            waited = source in self._lifecycle.waits  # then its own clock may have moved it
            self.last_message_id = await self._lives.tell(
                transition, cause=self.last_message_id if waited else ""
            )
        moved = {"fedbus.kind": transition.kind, "fedbus.from": source, "fedbus.to": str(target)}
        increment(TRANSITIONS, moved)
        self._state, self._facts = target, data
        self.event, self.reason = event, reason
        say = (
            log.debug if source == str(target) else log.info
        )  # a round further is in the trace and the event
        say(
            span_name(transition.kind, source or "•", str(target)),
            thing=transition.thing,
            event_word=str(event),
            reason=reason or None,
        )


class LifecycleStore:
    """The lifecycles that one agent owns."""

    def __init__(self, bus: Bus, outbox: TransitionOutbox | None = None) -> None:
        self._bus = bus
        self._outbox = outbox
        self._sequences: dict[str, int] = {}
        self._waiting = asyncio.Event()
        self._said = asyncio.Event()
        self._said.set()

    @classmethod
    @asynccontextmanager
    async def open(cls, bus: Bus, outbox: TransitionOutbox | None = None) -> AsyncIterator["LifecycleStore"]:
        """The agent's lifecycles for as long as the block runs; what still waits in the outbox stays there."""
        lives = cls(bus, outbox)
        if outbox is None:
            yield lives
            return
        await lives._drop_what_was_overtaken(outbox)
        async with background_task(lives._empty(outbox), name="empty the outbox"):
            yield lives
            await lives._say_the_rest()

    async def of(
        self, lifecycle: Lifecycle[State, Event, Data, Changes], facts: Data
    ) -> LifecycleHandle[State, Event, Data, Changes]:
        """The life of the thing that *facts* names, as the log tells it; with *facts* where it tells nothing."""
        subject = self._subject(lifecycle.kind, facts.thing)
        told = await self._told(subject)
        if told is None:
            return LifecycleHandle(self, lifecycle, facts)
        last, said_in = told
        known = type(facts).model_validate(last.facts.model_dump())
        return LifecycleHandle(self, lifecycle, known, last, said_in)

    async def tell(self, transition: Transition, *, cause: str = "") -> str:
        """Append *transition* to the log: at once by the outbox, or when the bus has taken it. The message's id.

        *cause*: what led to it, where nothing is being handled.
        """
        subject = self._subject(transition.kind, transition.thing)
        envelope = make_envelope(
            transition, source=self._bus.source, trace=tracing.current_trace_headers(), cause=cause
        )
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
            envelope, message = decode_message(entry.subject, entry.headers, entry.body)
            assert isinstance(message, Transition)
            return message, envelope.id
        if seen is None:
            return None
        assert isinstance(seen.message, Transition)
        return seen.message, seen.envelope.id

    async def _empty(self, outbox: TransitionOutbox) -> None:
        """Hand the bus what waits, in order, and wait for more."""
        while True:
            while (entry := outbox.first()) is not None:
                try:
                    await self._store(entry.subject, entry.headers, entry.body)
                except StaleOwner:
                    _remove_from_outbox(outbox, entry.subject)
                    raise
                outbox.remove(entry.number)
            self._said.set()
            await self._waiting.wait()
            self._waiting.clear()

    async def _drop_what_was_overtaken(self, outbox: TransitionOutbox) -> None:
        """Another owner may have moved the thing while we were away: then what we would say is of the past."""
        if (entry := outbox.first()) is None:
            return
        seen = await self._bus.last(entry.subject)
        _, waiting = decode_message(entry.subject, entry.headers, entry.body)
        assert isinstance(waiting, Transition)
        stands = getattr(seen.message, "target", "") if seen else ""
        said_already = seen is not None and seen.envelope.id == entry.headers["ce-id"]
        if waiting.source != stands and not said_already:
            log.warning(
                "Discarding stale outbox transition: another owner has moved this entity",
                entity=waiting.thing,
            )
            _remove_from_outbox(outbox, entry.subject)

    async def _say_the_rest(self, within_s: float = 2.0) -> None:
        """Flush the outbox for at most *within_s* at shutdown; the rest is published after the next start."""
        try:
            async with asyncio.timeout(within_s):
                await self._said.wait()
        except TimeoutError:
            log.warning("Shutdown timeout: transitions stay in the outbox until the next start")

    async def _store(self, subject: str, headers: dict[str, str], body: bytes) -> None:
        if subject not in self._sequences:
            seen = await self._bus.last(subject)
            self._sequences[subject] = seen.sequence if seen else 0
        expected = {EXPECTED_SEQUENCE_HEADER: str(self._sequences[subject])}
        try:
            self._sequences[subject] = await self._bus.store(subject, headers | expected, body)
        except PublishRefused as refused:
            if WRONG_SEQUENCE_CODE not in str(refused):
                raise
            self._sequences[subject] = await self._ours(subject, headers["ce-id"])

    async def _ours(self, subject: str, ce_id: str) -> int:
        """The sequence of our own message, where a lost acknowledgement made us say it twice."""
        seen = await self._bus.last(subject)
        if seen is None or seen.envelope.id != ce_id:
            kind, thing = subject.split(".life.", 1)[1].split(".", 1)
            raise StaleOwner(kind, thing)
        return seen.sequence

    def _subject(self, kind: str, thing: str) -> str:
        return subjects.lifecycle(self._bus.fed, kind, thing)


def _remove_from_outbox(outbox: TransitionOutbox, subject: str) -> None:
    """Let go of what waits to be said on *subject*: whoever it is about has another owner now."""
    while (entry := outbox.first()) is not None and entry.subject == subject:
        outbox.remove(entry.number)


def _span_attributes(transition: Transition, run: str | None) -> dict[str, str | int]:
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
