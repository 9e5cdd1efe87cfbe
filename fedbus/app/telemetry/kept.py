"""Spans on this machine's disk: what `fedbus trace` reads, with nothing else installed.

Every process appends to a file of its own in FEDBUS_HOME/traces, named for its service and
process, one OTLP/JSON document a line (https://opentelemetry.io/docs/specs/otel/protocol/file-exporter/), so
that a collector can read it too. Nothing is shared between processes, and a line is written at once, so
nothing can be torn but the last line of a machine that lost its power.

Bounded: a file is set aside at FILE_BYTES, and of all files the oldest go when they are more than was given.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import structlog
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import Link, SpanContext

FILE_BYTES: Final = 8 * 1024**2
WAITING: Final = 8192
"""Spans that may wait to be written; the oldest go first."""
EVERY_S: Final = 1.0
STOP_S: Final = 2.0
SUFFIX: Final = ".jsonl"

log = structlog.get_logger("fedbus.telemetry")


class KeptSpans(SpanProcessor):
    """Writes the spans of this process into *directory*, which holds *max_bytes* at the most."""

    def __init__(
        self, directory: Path, resource: Resource, *, max_bytes: int, file_bytes: int = FILE_BYTES
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._file_bytes = min(file_bytes, max_bytes)
        self._name = f"{resource.attributes['service.name']!s}-{os.getpid()}"
        self._resource = resource
        self._part = 0
        self._waiting: deque[ReadableSpan] = deque(maxlen=WAITING)
        self._work, self._closing = threading.Event(), threading.Event()
        self._rests = False
        self._writer = threading.Thread(target=self._write_all, name="keep spans", daemon=True)
        self._writer.start()

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self._waiting.append(span)
            if not self._work.is_set():
                self._work.set()

    def shutdown(self) -> None:
        self._closing.set()
        self._work.set()
        self._writer.join(STOP_S)

    def force_flush(self, timeout_millis: int = 30000) -> bool:  # noqa: ARG002  # OpenTelemetry's signature
        self._write(self._taken())
        return True

    def _write_all(self) -> None:
        while not self._closing.is_set():
            self._work.wait()
            self._closing.wait(EVERY_S)  # a second's spans are one line
            self._work.clear()
            self._write(self._taken())

    def _taken(self) -> list[ReadableSpan]:
        spans = []
        with suppress(IndexError):
            while True:
                spans.append(self._waiting.popleft())
        return spans

    def _write(self, spans: list[ReadableSpan]) -> None:
        """A disk that is full or not ours is no reason to stop anything: it is said once, and tried again."""
        if not spans:
            return
        try:
            self._append(line_of(self._resource, spans))
        except OSError as error:
            if not self._rests:
                log.warning(
                    "spans are not kept on this machine", directory=str(self._directory), reason=str(error)
                )
            self._rests = True
        else:
            self._rests = False

    def _append(self, line: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._path()
        is_new = not path.exists()
        with path.open("ab") as file:
            file.write(line)
            full = file.tell() >= self._file_bytes
        self._part += full
        if full or is_new:
            prune(self._directory, self._max_bytes)

    def _path(self) -> Path:
        return self._directory / f"{self._name}-{self._part}{SUFFIX}"


def prune(directory: Path, max_bytes: int) -> None:
    """Drop the files that were written to longest ago, until what is left takes *max_bytes* at the most."""
    found = []
    for path in directory.glob(f"*{SUFFIX}"):
        with suppress(OSError):  # another process drops them too
            found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            return
        total -= size
        path.unlink(missing_ok=True)


# --- OTLP as JSON --------------------------------------------------------------------------------


def line_of(resource: Resource, spans: Iterable[ReadableSpan]) -> bytes:
    """The *spans* of one process as one OTLP/JSON document, on one line."""
    scopes: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        scope = span.instrumentation_scope
        scopes.setdefault(scope.name if scope else "", []).append(_span(span))
    document = {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(resource.attributes)},
                "scopeSpans": [{"scope": {"name": name}, "spans": those} for name, those in scopes.items()],
            }
        ]
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _span(span: ReadableSpan) -> dict[str, Any]:
    assert span.context is not None
    told: dict[str, Any] = {
        "traceId": f"{span.context.trace_id:032x}",
        "spanId": f"{span.context.span_id:016x}",
        "name": span.name,
        "kind": span.kind.value + 1,
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _attributes(span.attributes or {}),
    }
    if span.parent is not None:
        told["parentSpanId"] = f"{span.parent.span_id:016x}"
    if span.links:
        told["links"] = [_link(link) for link in span.links]
    if span.events:
        told["events"] = [
            {
                "name": one.name,
                "timeUnixNano": str(one.timestamp),
                "attributes": _attributes(one.attributes or {}),
            }
            for one in span.events
        ]
    if not span.status.is_unset:
        told["status"] = {"code": span.status.status_code.value, "message": span.status.description or ""}
    return told


def _link(link: Link) -> dict[str, Any]:
    to: SpanContext = link.context
    return {
        "traceId": f"{to.trace_id:032x}",
        "spanId": f"{to.span_id:016x}",
        "attributes": _attributes(link.attributes or {}),
    }


def _attributes(attributes: Any) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: object) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case str():
            return {"stringValue": value}
        case list() | tuple():
            return {"arrayValue": {"values": [_value(one) for one in value]}}
        case _:
            return {"stringValue": str(value)}
