"""Span files: the spans of this machine on its disk, where `fedbus trace` reads them without a collector.

Each process appends to its own files in FEDBUS_HOME/traces, so processes share no file. A file is a sequence of
blocks. A block is a length of four bytes, then msgpack of the process's resource and of the spans of one second.
A power failure can truncate the last block of a file; the reader skips it. The format is not OTLP/JSON, which takes
ten times as long to write; `fedbus trace --otlp-json` converts the files.

A span that is open when the block of its second is written is in that block without an end, and in a later block with
its end. So `fedbus trace` shows a run in progress, and what a killed process was doing.

Limits: a file is closed at FILE_BYTES. The oldest files are deleted when all files exceed the configured size.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import msgpack
import structlog
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Event, ReadableSpan, Span
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext

FILE_BYTES: Final = 8 * 1024**2
MAX_QUEUE: Final = 16_384
"""Queue entries, two for each span; when the queue is full, the oldest are dropped."""
MAX_BATCH: Final = 2048
"""Queue entries that are written without waiting for the end of the second."""
WRITE_INTERVAL_S: Final = 1.0
SUFFIX: Final = ".spans"
LENGTH_BYTES: Final = 4
MESSAGE_CHARS: Final = 1000
NOT_STORED: Final = ("exception.stacktrace", "exception.escaped")

log = structlog.get_logger("fedbus.telemetry")


class SpanRecord(NamedTuple):
    """One stored span: raw ids, times in nanoseconds, kinds and codes with OTLP's numbers.

    The *end* of an open span is 0.
    """

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    name: str
    kind: int
    start: int
    end: int
    attributes: Mapping[str, Any]
    links: tuple[tuple[bytes, bytes], ...] = ()
    events: tuple[tuple[str, int, Mapping[str, Any]], ...] = ()
    status: int = 0
    message: str = ""
    scope: str = ""


class SpanFileExporter(SpanExporter):
    """Writes the spans of this process into *directory*, which holds *max_bytes* at most."""

    def __init__(
        self, directory: Path, resource: Mapping[str, Any], *, max_bytes: int, file_bytes: int = FILE_BYTES
    ) -> None:
        self._directory = directory
        self._resource = dict(resource)
        self._max_bytes = max_bytes
        self._file_bytes = min(file_bytes, max_bytes)
        self._name = f"{resource['service.name']}-{os.getpid()}-{time.time_ns():x}"
        self._part = 0
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append one block. A full or read-only disk is logged once, and the next export tries again."""
        records = [record_of(span) for span in spans if not _ended_since_its_start(span)]
        if not records:
            return SpanExportResult.SUCCESS
        try:
            self._append(encode_block(self._resource, records))
        except OSError as error:
            if not self._is_failing:
                log.warning("Cannot store spans", directory=str(self._directory), reason=str(error))
            self._is_failing = True
            return SpanExportResult.FAILURE
        self._is_failing = False
        return SpanExportResult.SUCCESS

    def _append(self, written: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{self._name}-{self._part}{SUFFIX}"
        with path.open("ab") as file:
            is_new = file.tell() == 0
            file.write(written)
            is_full = file.tell() >= self._file_bytes
        self._part += is_full
        if is_full or is_new:
            prune(self._directory, self._max_bytes)


class SpanFileProcessor(BatchSpanProcessor):
    """Passes each span to *exporter* when it starts and when it ends, in batches of a second. Never blocks."""

    def __init__(self, exporter: SpanFileExporter, *, every_s: float = WRITE_INTERVAL_S) -> None:
        super().__init__(
            exporter,
            max_queue_size=MAX_QUEUE,
            schedule_delay_millis=every_s * 1000,
            max_export_batch_size=MAX_BATCH,
        )

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002  # the SDK's
        """Queue the open span; the exporter skips this entry if the span has ended by then."""
        self.on_end(span)


def record_of(span: ReadableSpan) -> SpanRecord:
    """Copy *span*, which another thread may be changing: the SDK's lists and ``copy`` are safe then."""
    assert span.context is not None
    trace_id, span_id = _ids_of(span.context)
    return SpanRecord(
        trace_id,
        span_id,
        _ids_of(span.parent)[1] if span.parent else b"",
        span.name,
        span.kind.value + 1,
        span.start_time or 0,
        span.end_time or 0,
        cast("dict[str, Any]", span.attributes).copy() if span.attributes else {},
        tuple(_ids_of(link.context) for link in span.links),
        tuple(_event(event) for event in span.events),
        span.status.status_code.value,
        span.status.description or "",
        span.instrumentation_scope.name if span.instrumentation_scope else "",
    )


def encode_block(resource: Mapping[str, Any], records: list[SpanRecord]) -> bytes:
    """Encode one block of a file: the *records* of one process."""
    packed: bytes = msgpack.packb([resource, records], default=str)
    return len(packed).to_bytes(LENGTH_BYTES, "big") + packed


def prune(directory: Path, max_bytes: int) -> None:
    """Delete the least recently written files until the rest takes *max_bytes* at most."""
    found = []
    for path in directory.glob(f"*{SUFFIX}"):
        with suppress(OSError):  # another process deletes files too
            found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            return
        total -= size
        path.unlink(missing_ok=True)


def _ended_since_its_start(span: ReadableSpan) -> bool:
    """Return whether *span* was queued at its start and has ended. Its end is queued as a copy, which is no Span."""
    return isinstance(span, Span) and not span.is_recording()


def _event(event: Event) -> tuple[str, int, Mapping[str, Any]]:
    """Return *event* without its stack trace, which the log line has and which would fill the file."""
    about = {
        name: value[:MESSAGE_CHARS] if isinstance(value, str) else value
        for name, value in (event.attributes or {}).items()
        if name not in NOT_STORED
    }
    return event.name, event.timestamp, about


def _ids_of(context: SpanContext) -> tuple[bytes, bytes]:
    """Return the trace's id and the span's, as raw bytes."""
    return context.trace_id.to_bytes(16, "big"), context.span_id.to_bytes(8, "big")
