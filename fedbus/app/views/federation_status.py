"""A `FederationView` that follows the bus, and the order in which `fedbus top` lists its clients."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final

from fedbus.bus.background import background_task
from fedbus.bus.bus import Bus
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.client import Heartbeat
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.message import Message
from fedbus.contracts.transition import Transition
from fedbus.domain.federation_view import PARTICIPATION_MESSAGES, ClientView, FederationView

RATE_WINDOW_S: Final = 10.0
LOWEST: Final = float("-inf")

OnChange = Callable[[], None]


# --- from the bus -----------------------------------------------------------------------------------


async def load_view(bus: Bus, view: FederationView) -> None:
    """Load the current state of the federation: the last report of each device and the last message of each subject."""
    for stored in await bus.last_per_device(DeviceReport):
        view.apply(stored.message, at=stored.envelope.time)
    transitions = await bus.last_per_subject(
        lifecycle_stream(bus.fed), [subjects.wildcard_for(bus.fed, Transition)]
    )
    participations = await bus.last_per_subject(
        events_stream(bus.fed), [subjects.wildcard_for(bus.fed, kind) for kind in PARTICIPATION_MESSAGES]
    )
    for stored in sorted([*transitions, *participations], key=lambda stored: stored.sequence):
        apply_stored(view, stored)


def apply_stored(view: FederationView, stored: StoredMessage) -> bool:
    """Apply a message of a stream; return whether it changed the view."""
    return view.apply(stored.message, at=stored.envelope.time, sequence=stored.sequence)


@asynccontextmanager
async def follow_view(bus: Bus, view: FederationView, on_change: OnChange) -> AsyncIterator[None]:
    """Load *view* before the block runs, and keep it up to date meanwhile. Call *on_change* for each message.

    Raises:
        FederationNotFound: The federation has no streams.
        BusClosed: The connection is lost for good.

    """
    ready = asyncio.Event()
    async with background_task(_follow(bus, view, on_change, ready), name="follow the federation"):
        await ready.wait()
        yield


async def _follow(bus: Bus, view: FederationView, on_change: OnChange, ready: asyncio.Event) -> None:
    streams = {
        lifecycle_stream(bus.fed): [subjects.wildcard_for(bus.fed, Transition)],
        events_stream(bus.fed): stream_subjects(bus.fed),
    }
    ends = {name: (await bus.sequence_range(name))[1] for name in streams}
    async with AsyncExitStack() as subscriptions:
        stored_messages = [
            await subscriptions.enter_async_context(bus.read_stream(name, wanted, after=ends[name]))
            for name, wanted in streams.items()
        ]
        reports = [
            await subscriptions.enter_async_context(bus.subscribe_ephemeral(kind, task="*"))
            for kind in (DeviceReport, Heartbeat)
        ]
        await load_view(bus, view)
        ready.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(_wait_until_lost(bus), name="wait for the end of the connection")
            for stream in stored_messages:
                group.create_task(_apply_stream(stream, view, on_change), name="apply a stream")
            for subscription in reports:
                group.create_task(_apply_reports(subscription, view, on_change), name="apply reports")


async def _wait_until_lost(bus: Bus) -> None:
    await bus.wait_closed()


async def _apply_stream(
    stream: AsyncIterator[StoredMessage], view: FederationView, on_change: OnChange
) -> None:
    async for stored in stream:
        apply_stored(view, stored)
        on_change()


async def _apply_reports(reports: AsyncIterator[Message], view: FederationView, on_change: OnChange) -> None:
    async for report in reports:
        view.apply(report, at=datetime.now(UTC))
        on_change()


# --- the order of clients ---------------------------------------------------------------------------

SortKey = Callable[[FederationView, ClientView], Any]

SORT_KEYS: Final[dict[str, SortKey]] = {
    "name": lambda _, client: natural_key(f"{client.client}.{client.task}"),
    "state": lambda _, client: (client.state, client.training_state),
    "training": lambda _, client: (not client.is_training, client.training_state),
    "model": lambda _, client: client.model_version or 0,
    "cpu": lambda view, client: -_or_lowest(device_usage(view, client, "cpu")),
    "memory": lambda view, client: -_or_lowest(device_usage(view, client, "memory")),
    "heat": lambda view, client: -_or_lowest(device_usage(view, client, "temperature_c")),
    "seen": lambda view, client: (
        view.presence.last_seen[client.client].timestamp()
        if client.client in view.presence.last_seen
        else 0.0
    ),
    "why": lambda view, client: (client.is_training, view.not_training_reason(client)),
}
"""The busiest, hottest, longest unseen and training clients come first."""


def sort_clients(view: FederationView, by: str, *, reverse: bool = False) -> list[ClientView]:
    """Sort the clients by a key of `SORT_KEYS`; equal ones by name."""
    key = SORT_KEYS[by]
    by_name = sorted(view.clients.values(), key=lambda client: natural_key(f"{client.client}.{client.task}"))
    return sorted(by_name, key=lambda client: key(view, client), reverse=reverse)


def device_usage(view: FederationView, client: ClientView, field: str) -> float | None:
    """Return *field* of the last report of the client's device: ``cpu``, ``memory`` or ``temperature_c``."""
    device = view.presence.devices.get(client.client)
    return None if device is None else getattr(device.report, field)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts c10 after c9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def _or_lowest(value: float | None) -> float:
    return LOWEST if value is None else value


# --- the rate of messages ---------------------------------------------------------------------------


class EventRate:
    """The rate of events over the last *window_s* seconds. It stores one number per second."""

    def __init__(self, window_s: float = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._counts: deque[tuple[int, int]] = deque()
        self._start: float | None = None

    def count(self, now: float) -> None:
        self._start = now if self._start is None else self._start
        second = int(now)
        if self._counts and self._counts[-1][0] == second:
            self._counts[-1] = (second, self._counts[-1][1] + 1)
        else:
            self._counts.append((second, 1))

    def per_s(self, now: float) -> float:
        while self._counts and self._counts[0][0] < now - self._window_s:
            self._counts.popleft()
        observed_s = min(self._window_s, max(1.0, now - self._start)) if self._start is not None else 1.0
        return sum(count for _, count in self._counts) / observed_s
