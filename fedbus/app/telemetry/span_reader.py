"""Reading of span files (see `span_files`).

Unreadable blocks are skipped, such as the last one of a file that a power failure truncated.
"""

import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgpack
import psutil

from fedbus.app.telemetry.span_files import LENGTH_BYTES, SUFFIX, SpanRecord
from fedbus.domain.critical_path import SpanStatus, TracedSpan

FIRST_TRANSITION: Final = "run • → requested"
NANO: Final = 1e-9
STATUS_ERROR: Final = 2
"""The status code of a span that an exception ended."""
ENDING_ATTRIBUTE: Final = "fedbus.ending"
"""Marks spans without an end in an export, whose format requires one."""

Resource = Mapping[str, Any]
Block = tuple[Resource, list[SpanRecord]]


@dataclass(frozen=True)
class StoredTrace:
    """The blocks of one trace by process, as read at *read_at_ns* (nanoseconds since the epoch)."""

    trace_id: str
    blocks: list[Block]
    read_at_ns: int = field(default_factory=time.time_ns)

    @property
    def processes(self) -> int:
        return len({resource.get("service.instance.id") for resource, _ in self.blocks})

    def spans(self) -> list[TracedSpan]:
        """List the spans. ``service`` is the client of a span's process, or its agent if it has no client."""
        return [
            _to_traced(record, ending, str(resource.get("fedbus.client") or resource.get("service.name", "")))
            for resource, records in self.blocks
            for record, ending in _with_endings(resource, records, self.read_at_ns)
        ]

    def as_otlp(self) -> dict[str, Any]:
        """Convert to one OTLP/JSON document, which Grafana, Jaeger and a collector accept."""
        return {
            "resourceSpans": [
                {
                    "resource": {"attributes": _otlp_attributes(resource)},
                    "scopeSpans": _otlp_scopes(_with_endings(resource, records, self.read_at_ns)),
                }
                for resource, records in self.blocks
            ]
        }


def find_trace_of_run(directory: Path, run: str) -> str | None:
    """Find the id of the trace in which *run* was requested; else of the trace with most spans of the run."""
    votes: Counter[str] = Counter()
    for _, records in _read_blocks(directory, run.encode()):
        for record in records:
            if record.attributes.get("fedbus.run") == run:
                if record.name == FIRST_TRANSITION:
                    return record.trace_id.hex()
                votes[record.trace_id.hex()] += 1
    return votes.most_common(1)[0][0] if votes else None


def list_runs(directory: Path) -> list[str]:
    """List the runs that were requested on this machine and whose spans are stored, newest last."""
    found: dict[str, int] = {}
    for _, records in _read_blocks(directory, FIRST_TRANSITION.encode()):
        for record in records:
            if record.name == FIRST_TRANSITION:
                found[str(record.attributes.get("fedbus.run", ""))] = record.start
    return sorted(found, key=lambda run: found[run])


def read_trace(directory: Path, trace_id: str) -> StoredTrace:
    """Read one trace."""
    wanted = bytes.fromhex(trace_id)
    by_process: dict[str, tuple[Resource, dict[bytes, SpanRecord]]] = {}
    for resource, records in _read_blocks(directory, wanted):
        _, spans = by_process.setdefault(repr(resource), (resource, {}))
        for record in records:
            if record.trace_id == wanted and (record.end or record.span_id not in spans):
                spans[record.span_id] = record
    blocks = [(resource, list(spans.values())) for resource, spans in by_process.values() if spans]
    return StoredTrace(trace_id, blocks)


def has_running_owner(directory: Path, stored: StoredTrace, run: str) -> bool:
    """Return whether the owner of *run* runs: the process of its last transition, or a later one of that service."""
    transitions = [
        (record.start, resource)
        for resource, records in stored.blocks
        for record in records
        if "→" in record.name
        and record.name.startswith("run ")
        and record.attributes.get("fedbus.run") == run
    ]
    if not transitions:
        return False
    started_ns, owner = max(transitions, key=lambda transition: transition[0])
    return _is_running(owner, before=started_ns) or any(
        _runs(pid, before=start) for pid, start in _writers(directory, str(owner.get("service.name", "")))
    )


def _writers(directory: Path, service: str) -> Iterator[tuple[int, int]]:
    """Return the process ids of *service* and their start times in nanoseconds, from the names of their files."""
    for path in directory.glob(f"{service}-*{SUFFIX}"):
        with suppress(ValueError):  # another service whose name has this prefix
            pid, start, _ = path.stem.removeprefix(f"{service}-").split("-")
            yield int(pid), int(start, 16)


def _read_blocks(directory: Path, holding: bytes) -> Iterator[Block]:
    """Unpack the blocks that contain the bytes *holding*: most are of other traces, and unpacking is the cost."""
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            with path.open("rb") as file:
                while len(length := file.read(LENGTH_BYTES)) == LENGTH_BYTES:
                    block = file.read(int.from_bytes(length, "big"))
                    if holding in block and (found := _decode_block(block)) is not None:
                        yield found
        except OSError:  # pruned in the meantime
            continue


def _decode_block(block: bytes) -> Block | None:
    try:
        resource, records = msgpack.unpackb(block)
        return resource, [SpanRecord(*record) for record in records]
    except (ValueError, TypeError, msgpack.UnpackException):
        return None


def _with_endings(
    resource: Resource, records: list[SpanRecord], now: int
) -> list[tuple[SpanRecord, SpanStatus]]:
    """Give each record an end: an open span ends now, or at the last record of its process if that has ended."""
    if all(record.end for record in records):
        return [(record, SpanStatus.ENDED) for record in records]
    if _is_running(resource, before=min(record.start for record in records)):
        until, ending = now, SpanStatus.OPEN
    else:
        until, ending = max(max(record.start, record.end) for record in records), SpanStatus.CUT_OFF
    return [
        (record, SpanStatus.ENDED) if record.end else (record._replace(end=until), ending)
        for record in records
    ]


def _is_running(resource: Resource, *, before: int) -> bool:
    """Return whether the process runs. Processes of other machines are assumed to."""
    return resource.get("host.name") != platform.node() or _runs(resource["process.pid"], before=before)


def _runs(pid: int, *, before: int) -> bool:
    """Return whether the process *pid* runs and started *before* this time in nanoseconds."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= before * NANO
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it runs under another user
        return True


def _to_traced(record: SpanRecord, ending: SpanStatus, service: str) -> TracedSpan:
    return TracedSpan(
        id=record.span_id.hex(),
        name=record.name,
        start=record.start * NANO,
        end=record.end * NANO,
        parent=record.parent_id.hex(),
        links=tuple(span_id.hex() for _, span_id in record.links),
        attributes={**record.attributes, "service": service, "failed": record.status == STATUS_ERROR},
        status=ending,
    )


# --- OTLP as JSON --------------------------------------------------------------------------------


def _otlp_scopes(records: list[tuple[SpanRecord, SpanStatus]]) -> list[dict[str, Any]]:
    scopes: dict[str, list[dict[str, Any]]] = {}
    for record, ending in records:
        marked = (
            record.attributes
            if ending is SpanStatus.ENDED
            else {**record.attributes, ENDING_ATTRIBUTE: str(ending)}
        )
        scopes.setdefault(record.scope, []).append(_otlp_span(record._replace(attributes=marked)))
    return [{"scope": {"name": name}, "spans": spans} for name, spans in scopes.items()]


def _otlp_span(record: SpanRecord) -> dict[str, Any]:
    span: dict[str, Any] = {
        "traceId": record.trace_id.hex(),
        "spanId": record.span_id.hex(),
        "parentSpanId": record.parent_id.hex(),
        "name": record.name,
        "kind": record.kind,
        "startTimeUnixNano": str(record.start),
        "endTimeUnixNano": str(record.end),
        "attributes": _otlp_attributes(record.attributes),
        "links": [{"traceId": trace.hex(), "spanId": linked.hex()} for trace, linked in record.links],
        "events": [
            {"name": name, "timeUnixNano": str(when), "attributes": _otlp_attributes(about)}
            for name, when, about in record.events
        ],
        "status": {"code": record.status, "message": record.message} if record.status else {},
    }
    return {name: value for name, value in span.items() if value or name == "kind"}


def _otlp_attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _otlp_value(value)} for key, value in attributes.items()]


def _otlp_value(value: object) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case list() | tuple():
            return {"arrayValue": {"values": [_otlp_value(one) for one in value]}}
        case _:
            return {"stringValue": str(value)}
