"""Spans out of the files in which every process of this machine keeps its own (see `kept`).

What cannot be read, such as the torn last block of a machine that lost its power, is passed over.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack

from fedbus.app.telemetry.kept import LENGTH_BYTES, SUFFIX, Record
from fedbus.domain.critical_path import Traced

FIRST_MOVE: Final = "run • → requested"
NANO: Final = 1e-9
FAILED: Final = 2
"""The status of a span that ended by an exception."""

Resource = Mapping[str, Any]
Block = tuple[Resource, list[Record]]


@dataclass(frozen=True)
class Kept:
    """One trace, as it was kept, process by process."""

    trace_id: str
    blocks: list[Block]

    @property
    def processes(self) -> int:
        return len({resource.get("service.instance.id") for resource, _ in self.blocks})

    def spans(self) -> list[Traced]:
        """Its spans. Each knows by ``service`` whose process it is of: which client's, else which agent's."""
        return [
            _traced(record, str(resource.get("fedbus.client") or resource.get("service.name", "")))
            for resource, records in self.blocks
            for record in records
        ]

    def as_otlp(self) -> dict[str, Any]:
        """One OTLP/JSON document of all of it, as Grafana, Jaeger and a collector take it."""
        return {
            "resourceSpans": [
                {"resource": {"attributes": _attributes(resource)}, "scopeSpans": _scopes(records)}
                for resource, records in self.blocks
            ]
        }


def trace_of_run(directory: Path, run: str) -> str | None:
    """The trace of *run*: where it was begun, else the one that speaks of it most."""
    votes: Counter[str] = Counter()
    for _, records in _blocks(directory, run.encode()):
        for record in records:
            if record.attributes.get("fedbus.run") == run:
                if record.name == FIRST_MOVE:
                    return record.trace_id.hex()
                votes[record.trace_id.hex()] += 1
    return votes.most_common(1)[0][0] if votes else None


def runs_in(directory: Path) -> list[str]:
    """The runs that were begun on this machine and are still kept, the newest last."""
    found: dict[str, int] = {}
    for _, records in _blocks(directory, FIRST_MOVE.encode()):
        for record in records:
            if record.name == FIRST_MOVE:
                found[str(record.attributes.get("fedbus.run", ""))] = record.start
    return sorted(found, key=lambda run: found[run])


def read_trace(directory: Path, trace_id: str) -> Kept:
    """All that is kept of one trace."""
    wanted = bytes.fromhex(trace_id)
    blocks = [
        (resource, [record for record in records if record.trace_id == wanted])
        for resource, records in _blocks(directory, wanted)
    ]
    return Kept(trace_id, [(resource, records) for resource, records in blocks if records])


def _blocks(directory: Path, holding: bytes) -> Iterator[Block]:
    """The blocks that hold these bytes, read: most are of other traces, and reading them is the work."""
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            with path.open("rb") as file:
                while len(length := file.read(LENGTH_BYTES)) == LENGTH_BYTES:
                    block = file.read(int.from_bytes(length, "big"))
                    if holding in block and (found := _unpacked(block)) is not None:
                        yield found
        except OSError:  # it was dropped for its age meanwhile
            continue


def _unpacked(block: bytes) -> Block | None:
    try:
        resource, records = msgpack.unpackb(block)
        return resource, [Record(*record) for record in records]
    except (ValueError, TypeError, msgpack.UnpackException):
        return None


def _traced(record: Record, service: str) -> Traced:
    return Traced(
        id=record.span_id.hex(),
        name=record.name,
        start=record.start * NANO,
        end=record.end * NANO,
        parent=record.parent_id.hex(),
        links=tuple(span_id.hex() for _, span_id in record.links),
        attributes={**record.attributes, "service": service, "failed": record.status == FAILED},
    )


# --- OTLP as JSON --------------------------------------------------------------------------------


def _scopes(records: list[Record]) -> list[dict[str, Any]]:
    scopes: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        scopes.setdefault(record.scope, []).append(_span(record))
    return [{"scope": {"name": name}, "spans": spans} for name, spans in scopes.items()]


def _span(record: Record) -> dict[str, Any]:
    told: dict[str, Any] = {
        "traceId": record.trace_id.hex(),
        "spanId": record.span_id.hex(),
        "parentSpanId": record.parent_id.hex(),
        "name": record.name,
        "kind": record.kind,
        "startTimeUnixNano": str(record.start),
        "endTimeUnixNano": str(record.end),
        "attributes": _attributes(record.attributes),
        "links": [{"traceId": trace.hex(), "spanId": span.hex()} for trace, span in record.links],
        "events": [
            {"name": name, "timeUnixNano": str(when), "attributes": _attributes(about)}
            for name, when, about in record.events
        ],
        "status": {"code": record.status, "message": record.message} if record.status else {},
    }
    return {name: value for name, value in told.items() if value or name == "kind"}


def _attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: object) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case list() | tuple():
            return {"arrayValue": {"values": [_value(one) for one in value]}}
        case _:
            return {"stringValue": str(value)}
