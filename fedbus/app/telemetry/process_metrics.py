"""Metrics of a process: the lag of its event loop, and those of its nats-server.

Both are measured only if a collector for metrics is configured.
"""

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from fedbus.app.telemetry_endpoints import METRICS, is_configured
from fedbus.contracts.telemetry import (
    LOOP_LAG,
    NATS_CONNECTIONS,
    NATS_CPU,
    NATS_IO,
    NATS_MEMORY,
    NATS_MESSAGES,
    NATS_SLOW_CONSUMERS,
    NATS_STREAM_MESSAGES,
    NATS_STREAM_SIZE,
    Attributes,
    Metric,
    observable_gauge,
    record,
)

LAG_INTERVAL_S: Final = 1.0
REQUEST_S: Final = 1.0
CACHE_S: Final = 5.0
"""How long an answer of nats-server is reused, so that one export sends one request of each kind."""
MAX_STREAMS: Final = 100
Samples = Iterable[tuple[float, Attributes]]


@contextmanager
def measure_process(nats_monitor: str = "") -> Iterator[None]:
    """Measure on the running loop until the block ends. *nats_monitor*: ``http://127.0.0.1:8222``, or empty."""
    if not is_configured(METRICS):
        yield
        return
    with ExitStack() as metrics:
        metrics.enter_context(_loop_lag(asyncio.get_running_loop()))
        if nats_monitor:
            metrics.enter_context(nats_server_metrics(nats_monitor))
        yield


@contextmanager
def _loop_lag(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Measure how much later than scheduled the loop calls a callback."""
    lag = _LoopLag(loop)
    try:
        yield
    finally:
        lag.timer.cancel()


class _LoopLag:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due = loop.time() + LAG_INTERVAL_S
        self.timer = loop.call_at(self._due, self._on_timer)

    def _on_timer(self) -> None:
        record(LOOP_LAG, max(0.0, self._loop.time() - self._due))
        self._due = self._loop.time() + LAG_INTERVAL_S
        self.timer = self._loop.call_at(self._due, self._on_timer)


@contextmanager
def nats_server_metrics(monitor: str) -> Iterator[None]:
    """Read ``/varz`` and ``/jsz`` at *monitor*. A server that does not answer has no metrics."""
    server = _NatsMonitor(monitor.rstrip("/"))
    with ExitStack() as gauges:
        for metric, read in server.readers().items():
            gauges.enter_context(observable_gauge(metric, read))
        yield


class _NatsMonitor:
    """The monitoring port of a nats-server. The exporter's thread sends the requests, so they may block."""

    def __init__(self, monitor: str) -> None:
        self._url = monitor
        self._answers: dict[str, tuple[float, Mapping[str, Any]]] = {}

    def readers(self) -> Mapping[Metric, Callable[[], Samples]]:
        return {
            NATS_CONNECTIONS: lambda: self._read_varz("connections"),
            NATS_CPU: lambda: [(percent / 100, about) for percent, about in self._read_varz("cpu")],
            NATS_MEMORY: lambda: self._read_varz("mem"),
            NATS_SLOW_CONSUMERS: lambda: self._read_varz("slow_consumers"),
            NATS_MESSAGES: lambda: [
                *self._read_varz("in_msgs", "receive"),
                *self._read_varz("out_msgs", "transmit"),
            ],
            NATS_IO: lambda: [
                *self._read_varz("in_bytes", "receive"),
                *self._read_varz("out_bytes", "transmit"),
            ],
            NATS_STREAM_MESSAGES: lambda: self._read_streams("messages"),
            NATS_STREAM_SIZE: lambda: self._read_streams("bytes"),
        }

    def _read_varz(self, name: str, direction: str = "") -> list[tuple[float, Attributes]]:
        value = self._cached("varz").get(name)
        about = {"network.io.direction": direction} if direction else {}
        return [(float(value), about)] if isinstance(value, int | float) else []

    def _read_streams(self, name: str) -> list[tuple[float, Attributes]]:
        accounts = self._cached("jsz?streams=true").get("account_details") or []
        streams = [stream for account in accounts for stream in account.get("stream_detail") or []]
        return [
            (float(stream["state"][name]), {"fedbus.stream": str(stream["name"])})
            for stream in streams[:MAX_STREAMS]
        ]

    def _cached(self, path: str) -> Mapping[str, Any]:
        when, answer = self._answers.get(path, (float("-inf"), {}))
        if time.monotonic() - when > CACHE_S:
            answer = self._request(path)
            self._answers[path] = time.monotonic(), answer
        return answer

    def _request(self, path: str) -> Mapping[str, Any]:
        try:
            with urllib.request.urlopen(f"{self._url}/{path}", timeout=REQUEST_S) as reply:  # noqa: S310 - http on loopback
                found = json.load(reply)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
