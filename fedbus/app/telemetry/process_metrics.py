"""Figures of a process of ours: how late its loop is, and what its nats-server tells of itself.

Both are only taken where a collector is named for figures; elsewhere nothing runs.
"""

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from fedbus.app.telemetry_endpoints import METRICS, named
from fedbus.contracts.telemetry import (
    LOOP_LAG,
    NATS_CONNECTIONS,
    NATS_CPU,
    NATS_IO,
    NATS_MEMORY,
    NATS_MESSAGES,
    NATS_SLOW,
    NATS_STREAM_MESSAGES,
    NATS_STREAM_SIZE,
    About,
    Metric,
    observed,
    record,
)

EVERY_S: Final = 1.0
ASK_S: Final = 1.0
FRESH_S: Final = 5.0
"""An answer this old is good enough for the next figure: one export asks once."""
STREAMS: Final = 100
Figures = Iterable[tuple[float, About]]


@contextmanager
def watched(nats_monitor: str = "") -> Iterator[None]:
    """Take them, on the running loop, until the block ends. *nats_monitor*: ``http://127.0.0.1:8222``, or nothing."""
    if not named(METRICS):
        yield
        return
    with ExitStack() as taken:
        taken.enter_context(_loop_watched(asyncio.get_running_loop()))
        if nats_monitor:
            taken.enter_context(nats_server_watched(nats_monitor))
        yield


@contextmanager
def _loop_watched(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """How much later than asked the loop comes round to a thing."""
    lag = _Lag(loop)
    try:
        yield
    finally:
        lag.timer.cancel()


class _Lag:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due = loop.time() + EVERY_S
        self.timer = loop.call_at(self._due, self._come_round)

    def _come_round(self) -> None:
        record(LOOP_LAG, max(0.0, self._loop.time() - self._due))
        self._due = self._loop.time() + EVERY_S
        self.timer = self._loop.call_at(self._due, self._come_round)


@contextmanager
def nats_server_watched(monitor: str) -> Iterator[None]:
    """What ``/varz`` and ``/jsz`` at *monitor* say. Who does not answer has no figures."""
    server = _NatsServer(monitor.rstrip("/"))
    with ExitStack() as figures:
        for metric, read in server.figures().items():
            figures.enter_context(observed(metric, read))
        yield


class _NatsServer:
    """A nats-server, by its monitoring port. Asked in the exporter's thread, so that it may take its time."""

    def __init__(self, monitor: str) -> None:
        self._monitor = monitor
        self._answers: dict[str, tuple[float, Mapping[str, Any]]] = {}

    def figures(self) -> Mapping[Metric, Callable[[], Figures]]:
        return {
            NATS_CONNECTIONS: lambda: self._varz("connections"),
            NATS_CPU: lambda: [(percent / 100, about) for percent, about in self._varz("cpu")],
            NATS_MEMORY: lambda: self._varz("mem"),
            NATS_SLOW: lambda: self._varz("slow_consumers"),
            NATS_MESSAGES: lambda: [*self._varz("in_msgs", "receive"), *self._varz("out_msgs", "transmit")],
            NATS_IO: lambda: [*self._varz("in_bytes", "receive"), *self._varz("out_bytes", "transmit")],
            NATS_STREAM_MESSAGES: lambda: self._streams("messages"),
            NATS_STREAM_SIZE: lambda: self._streams("bytes"),
        }

    def _varz(self, name: str, direction: str = "") -> list[tuple[float, About]]:
        value = self._asked("varz").get(name)
        about = {"network.io.direction": direction} if direction else {}
        return [(float(value), about)] if isinstance(value, int | float) else []

    def _streams(self, name: str) -> list[tuple[float, About]]:
        accounts = self._asked("jsz?streams=true").get("account_details") or []
        streams = [stream for account in accounts for stream in account.get("stream_detail") or []]
        return [
            (float(stream["state"][name]), {"fedbus.stream": str(stream["name"])})
            for stream in streams[:STREAMS]
        ]

    def _asked(self, what: str) -> Mapping[str, Any]:
        when, answer = self._answers.get(what, (float("-inf"), {}))
        if time.monotonic() - when > FRESH_S:
            answer = self._ask(what)
            self._answers[what] = time.monotonic(), answer
        return answer

    def _ask(self, what: str) -> Mapping[str, Any]:
        try:
            with urllib.request.urlopen(f"{self._monitor}/{what}", timeout=ASK_S) as reply:  # noqa: S310
                found = json.load(reply)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
