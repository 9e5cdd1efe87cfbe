"""Spans out of the files in which every process of this machine keeps its own (see `kept`).

What cannot be read, such as the torn last block of a machine that lost its power, is passed over.
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

from fedbus.app.telemetry.span_files import LENGTH_BYTES, SUFFIX, Record
from fedbus.domain.critical_path import Ending, Traced

FIRST_MOVE: Final = "run • → requested"
NANO: Final = 1e-9
FAILED: Final = 2
"""The status of a span that ended by an exception."""
ENDING: Final = "fedbus.ending"
"""Marks what has no end, in an export, whose format has no word for it."""

Resource = Mapping[str, Any]
Block = tuple[Resource, list[Record]]


@dataclass(frozen=True)
class Kept:
    """One trace, as it was kept, process by process, and how it stood *at* that time, in nanoseconds."""

    trace_id: str
    blocks: list[Block]
    at: int = field(default_factory=time.time_ns)

    @property
    def processes(self) -> int:
        return len({resource.get("service.instance.id") for resource, _ in self.blocks})

    def spans(self) -> list[Traced]:
        """Its spans. Each knows by ``service`` whose process it is of: which client's, else which agent's."""
        return [
            _traced(record, ending, str(resource.get("fedbus.client") or resource.get("service.name", "")))
            for resource, records in self.blocks
            for record, ending in _endings(resource, records, self.at)
        ]

    def as_otlp(self) -> dict[str, Any]:
        """One OTLP/JSON document of all of it, as Grafana, Jaeger and a collector take it."""
        return {
            "resourceSpans": [
                {
                    "resource": {"attributes": _attributes(resource)},
                    "scopeSpans": _scopes(_endings(resource, records, self.at)),
                }
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
    of_process: dict[str, tuple[Resource, dict[bytes, Record]]] = {}
    for resource, records in _blocks(directory, wanted):
        _, spans = of_process.setdefault(repr(resource), (resource, {}))
        for record in records:
            if record.trace_id == wanted and (record.end or record.span_id not in spans):
                spans[record.span_id] = record
    blocks = [(resource, list(spans.values())) for resource, spans in of_process.values() if spans]
    return Kept(trace_id, blocks)


def is_looked_after(directory: Path, kept: Kept, run: str) -> bool:
    """Whether the process that moved *run* last still runs, or one of the same service that came after it."""
    moves = [
        (record.start, resource)
        for resource, records in kept.blocks
        for record in records
        if "→" in record.name
        and record.name.startswith("run ")
        and record.attributes.get("fedbus.run") == run
    ]
    if not moves:
        return False
    at, mover = max(moves, key=lambda move: move[0])
    return _is_there(mover, before=at) or any(
        _runs(pid, before=began) for pid, began in _keepers(directory, str(mover.get("service.name", "")))
    )


def _keepers(directory: Path, service: str) -> Iterator[tuple[int, int]]:
    """The processes of *service* that keep spans here, each with when it began to, by the names of their files."""
    for path in directory.glob(f"{service}-*{SUFFIX}"):
        with suppress(ValueError):  # another service, whose name only begins so
            pid, began, _ = path.stem.removeprefix(f"{service}-").split("-")
            yield int(pid), int(began, 16)


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


def _endings(resource: Resource, records: list[Record], now: int) -> list[tuple[Record, Ending]]:
    """Each with an end, and what that is worth: what has none lasts until now, or until its process was last heard."""
    if all(record.end for record in records):
        return [(record, Ending.ENDED) for record in records]
    if _is_there(resource, before=min(record.start for record in records)):
        until, ending = now, Ending.UNDER_WAY
    else:
        until, ending = max(max(record.start, record.end) for record in records), Ending.CUT_OFF
    return [
        (record, Ending.ENDED) if record.end else (record._replace(end=until), ending) for record in records
    ]


def _is_there(resource: Resource, *, before: int) -> bool:
    """Whether the process still runs; of other machines' nothing is known, so they are taken to."""
    return resource.get("host.name") != platform.node() or _runs(resource["process.pid"], before=before)


def _runs(pid: int, *, before: int) -> bool:
    """Whether the process of this number is one that was there *before*."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= before * NANO
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it is there, and not ours
        return True


def _traced(record: Record, ending: Ending, service: str) -> Traced:
    return Traced(
        id=record.span_id.hex(),
        name=record.name,
        start=record.start * NANO,
        end=record.end * NANO,
        parent=record.parent_id.hex(),
        links=tuple(span_id.hex() for _, span_id in record.links),
        attributes={**record.attributes, "service": service, "failed": record.status == FAILED},
        ending=ending,
    )


# --- OTLP as JSON --------------------------------------------------------------------------------


def _scopes(records: list[tuple[Record, Ending]]) -> list[dict[str, Any]]:
    scopes: dict[str, list[dict[str, Any]]] = {}
    for record, ending in records:
        marked = record.attributes if ending is Ending.ENDED else {**record.attributes, ENDING: str(ending)}
        scopes.setdefault(record.scope, []).append(_span(record._replace(attributes=marked)))
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
