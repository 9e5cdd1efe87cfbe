"""Lifecycles on the bus: the log is the state.

A transition is one message on the entity's own subject. The stream stores it only if the last message on that
subject is the one that the owner knows (``Nats-Expected-Last-Subject-Sequence``). So the last message is the
state, a second owner is rejected, and a restarted owner continues from the last message.

There are two modes:

- with an *outbox*, for an entity with one possible owner (a client, its FL client, its inference agent): the
  entity changes its state at once, even while disconnected; its transitions stay in the outbox, in order, until
  NATS has stored them.
- without an outbox, for an entity that several processes could own (a server, a run): the state changes only
  when NATS has stored the transition.
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

tracer = get_tracer("fedbus.lifecycles")
log = structlog.get_logger("fedbus.lifecycles")


class OutboxEntry(Protocol):
    """One message in an outbox."""

    @property
    def number(self) -> int: ...
    @property
    def subject(self) -> str: ...
    @property
    def headers(self) -> dict[str, str]: ...
    @property
    def body(self) -> bytes: ...


class TransitionOutbox(Protocol):
    """Stores messages in order, on disk, until they are removed. See `fedbus.stores.outbox`."""

    def append(self, subject: str, headers: dict[str, str], body: bytes) -> int: ...
    def first(self) -> OutboxEntry | None: ...
    def last(self, subject: str) -> OutboxEntry | None: ...
    def remove(self, number: int) -> None: ...


class LifecycleHandle(Generic[State, Event, Data, Changes]):
    """The lifecycle of one entity, for its owner. `LifecycleStore` creates it."""

    def __init__(
        self,
        store: "LifecycleStore",
        lifecycle: Lifecycle[State, Event, Data, Changes],
        facts: Data,
        last: Transition | None = None,
        last_message_id: str = "",
    ) -> None:
        self._store = store
        self._lifecycle = lifecycle
        self._data = facts
        self._state = lifecycle.states(last.target) if last else None
        self.event: Event | None = lifecycle.events(last.event) if last else None
        """The event of the last transition."""
        self.reason = last.reason if last else ""
        self.last_message_id = last_message_id
        """The id of the message that carried the last transition."""

    @property
    def state(self) -> State:
        """The current state. An entity without transitions is in its initial state."""
        return self._state or self._lifecycle.initial

    @property
    def data(self) -> Data:
        """The data of the last transition. Only a transition changes them."""
        return self._data

    @property
    def exists(self) -> bool:
        return self._state is not None

    def allows(self, event: Event) -> bool:
        return self._lifecycle.allows(self.state, event)

    async def create(self, *, reason: str = "") -> None:
        """Publish the creation of a new entity, in its initial state."""
        assert not self.exists
        run = getattr(self._data, "run", None)
        await self._publish_transition(
            self._lifecycle.creation, "", self._lifecycle.initial, self._data, reason=reason, run=run
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
            StaleOwner: Another owner has moved this entity.

        """
        target = self._lifecycle.advance(self.state, event)
        data = self._lifecycle.change(event, self._data, changes)
        run = getattr(data, "run", None) if changes.get("run") else self._current_run
        failure = ""
        if event in self._lifecycle.failure_events:
            failure = str(changes.get("trouble") or event)
        await self._publish_transition(
            event, str(self.state), target, data, reason=reason, deadline=deadline, run=run, failure=failure
        )

    @property
    def _current_run(self) -> str | None:
        """The run that the entity takes part in; None if its data only names the last one."""
        is_in_run = self.state not in self._lifecycle.between_runs
        return getattr(self._data, "run", None) if is_in_run else None

    async def _publish_transition(
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
            # A waiting state may end by its deadline, without a message; the cause is then the last transition.
            is_waiting = source in self._lifecycle.waits
            self.last_message_id = await self._store.append(
                transition, cause=self.last_message_id if is_waiting else ""
            )
        attributes = {"fedbus.kind": transition.kind, "fedbus.from": source, "fedbus.to": str(target)}
        increment(TRANSITIONS, attributes)
        self._state, self._data = target, data
        self.event, self.reason = event, reason
        write = log.debug if source == str(target) else log.info  # trace and events already show each round
        write(
            span_name(transition.kind, source or "•", str(target)),
            entity=transition.key,
            lifecycle_event=str(event),
            reason=reason or None,
        )


class LifecycleStore:
    """The lifecycles that one agent owns."""

    def __init__(self, bus: Bus, outbox: TransitionOutbox | None = None) -> None:
        self._bus = bus
        self._outbox = outbox
        self._sequences: dict[str, int] = {}
        self._has_entries = asyncio.Event()
        self._is_flushed = asyncio.Event()
        self._is_flushed.set()

    @classmethod
    @asynccontextmanager
    async def open(cls, bus: Bus, outbox: TransitionOutbox | None = None) -> AsyncIterator["LifecycleStore"]:
        """Open the agent's lifecycles for the duration of the block; entries left in the outbox stay there."""
        store = cls(bus, outbox)
        if outbox is None:
            yield store
            return
        await store._discard_unpublishable(outbox)
        async with background_task(store._flush_outbox_forever(outbox), name="flush the outbox"):
            yield store
            await store._flush_before_close()

    async def load(
        self, lifecycle: Lifecycle[State, Event, Data, Changes], facts: Data
    ) -> LifecycleHandle[State, Event, Data, Changes]:
        """Load the entity that *facts* names from the log; with *facts* as its data if it has no transition yet."""
        subject = self._subject(lifecycle.kind, facts.key)
        found = await self._last_transition(subject)
        if found is None:
            return LifecycleHandle(self, lifecycle, facts)
        last, message_id = found
        data = type(facts).model_validate(last.facts.model_dump())
        return LifecycleHandle(self, lifecycle, data, last, message_id)

    async def append(self, transition: Transition, *, cause: str = "") -> str:
        """Append *transition* to the outbox, or publish it and wait until NATS has stored it. Return the message id.

        *cause* is the id of the message that led to it, for a transition outside of any message handler.
        """
        subject = self._subject(transition.kind, transition.key)
        envelope = make_envelope(
            transition, source=self._bus.source, trace=tracing.current_trace_headers(), cause=cause
        )
        headers, body = envelope.headers(), pack(transition)
        if self._outbox is None:
            await self._store(subject, headers, body)
        else:
            self._outbox.append(subject, headers, body)
            self._is_flushed.clear()
            self._has_entries.set()
        return envelope.id

    async def _last_transition(self, subject: str) -> tuple[Transition, str] | None:
        """Return the last transition and its message id; an entry in the outbox is newer than the stream."""
        stored = await self._bus.last_on_subject(subject)
        published = self._sequences.get(subject, 0)  # the outbox may have published more during this read
        self._sequences[subject] = max(published, stored.sequence if stored else 0)
        entry = self._outbox.last(subject) if self._outbox else None
        if entry is not None:
            envelope, message = decode_message(entry.subject, entry.headers, entry.body)
            assert isinstance(message, Transition)
            return message, envelope.id
        if stored is None:
            return None
        assert isinstance(stored.message, Transition)
        return stored.message, stored.envelope.id

    async def _flush_outbox_forever(self, outbox: TransitionOutbox) -> None:
        """Publish the entries of the outbox, in order, and wait for more."""
        while True:
            while (entry := outbox.first()) is not None:
                try:
                    await self._store(entry.subject, entry.headers, entry.body)
                except StaleOwner:
                    _remove_from_outbox(outbox, entry.subject)
                    raise
                outbox.remove(entry.number)
            self._is_flushed.set()
            await self._has_entries.wait()
            self._has_entries.clear()

    async def _discard_unpublishable(self, outbox: TransitionOutbox) -> None:
        """Discard what must not be published after a restart.

        That is an entry that NATS has stored already, without an acknowledgement that this process received: the stream
        recognises the repetition only within its duplicate window. And it is the entries of an entity that another
        owner moved while this process was not running.
        """
        if (entry := outbox.first()) is None:
            return
        stored = await self._bus.last_on_subject(entry.subject)
        if stored is not None and stored.envelope.id == entry.headers["ce-id"]:
            outbox.remove(entry.number)
            return
        _, pending = decode_message(entry.subject, entry.headers, entry.body)
        assert isinstance(pending, Transition)
        state = getattr(stored.message, "target", "") if stored else ""
        if pending.source != state:
            log.warning(
                "Discarding stale outbox transition: another owner has moved this entity",
                entity=pending.key,
            )
            _remove_from_outbox(outbox, entry.subject)

    async def _flush_before_close(self, within_s: float = 2.0) -> None:
        """Flush the outbox for at most *within_s* at shutdown; the rest is published after the next start."""
        try:
            async with asyncio.timeout(within_s):
                await self._is_flushed.wait()
        except TimeoutError:
            log.warning("Shutdown timeout: transitions stay in the outbox until the next start")

    async def _store(self, subject: str, headers: dict[str, str], body: bytes) -> None:
        if subject not in self._sequences:
            stored = await self._bus.last_on_subject(subject)
            self._sequences[subject] = stored.sequence if stored else 0
        expected = {EXPECTED_SEQUENCE_HEADER: str(self._sequences[subject])}
        try:
            self._sequences[subject] = await self._bus.publish_to_stream(subject, headers | expected, body)
        except PublishRefused as refused:
            if WRONG_SEQUENCE_CODE not in str(refused):
                raise
            self._sequences[subject] = await self._confirm_own_publish(subject, headers["ce-id"])

    async def _confirm_own_publish(self, subject: str, ce_id: str) -> int:
        """Return the sequence of our own message, which was published twice because its acknowledgement was lost.

        Raises:
            StaleOwner: The last message is not ours.

        """
        stored = await self._bus.last_on_subject(subject)
        if stored is None or stored.envelope.id != ce_id:
            kind, entity = subject.split(".life.", 1)[1].split(".", 1)
            raise StaleOwner(kind, entity)
        return stored.sequence

    def _subject(self, kind: str, key: str) -> str:
        return subjects.lifecycle(self._bus.fed, kind, key)


def _remove_from_outbox(outbox: TransitionOutbox, subject: str) -> None:
    """Remove the leading entries on *subject*, whose entity has another owner."""
    while (entry := outbox.first()) is not None and entry.subject == subject:
        outbox.remove(entry.number)


def _span_attributes(transition: Transition, run: str | None) -> dict[str, str | int]:
    facts = vars(transition.facts)
    attributes: dict[str, str | int] = {
        "fedbus.kind": transition.kind,
        "fedbus.thing": transition.key,
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
