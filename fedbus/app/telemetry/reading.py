"""Spans out of the files in which every process of this machine keeps its own (see `kept`).

What cannot be read, such as the torn last line of a machine that lost its power, is passed over.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedbus.app.telemetry.kept import SUFFIX
from fedbus.domain.critical_path import Attribute, Traced

FIRST_MOVE: Final = "run • → requested"
NANO: Final = 1e-9

Document = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """One trace, as it was kept: OTLP documents that hold its spans and no others."""

    trace_id: str
    documents: list[Document]

    @property
    def processes(self) -> int:
        return len({json.dumps(one["resource"], sort_keys=True) for one in self._resources()})

    def spans(self) -> list[Traced]:
        """Its spans; those that came twice count once. Each knows its process by ``service``."""
        found: dict[str, Traced] = {}
        for resource in self._resources():
            service = _attributes(resource["resource"]).get("service.name", "")
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    found[span["spanId"]] = _traced(span, str(service))
        return list(found.values())

    def as_otlp(self) -> Document:
        """One OTLP/JSON document of all of it, as Grafana, Jaeger and a collector take it."""
        return {"resourceSpans": list(self._resources())}

    def _resources(self) -> Iterator[Document]:
        for document in self.documents:
            yield from document["resourceSpans"]


def trace_of_run(directory: Path, run: str) -> str | None:
    """The trace of *run*: where it was begun, else the one that speaks of it most."""
    votes: Counter[str] = Counter()
    wanted = json.dumps(run).encode()
    for document in _documents(directory, wanted):
        for span in _spans(document):
            if _attributes(span).get("fedbus.run") == run:
                if span["name"] == FIRST_MOVE:
                    return str(span["traceId"])
                votes[span["traceId"]] += 1
    return votes.most_common(1)[0][0] if votes else None


def runs_in(directory: Path) -> list[str]:
    """The runs that were begun on this machine and are still kept, the newest last."""
    found: dict[str, int] = {}
    for document in _documents(directory, FIRST_MOVE.encode()):
        for span in _spans(document):
            if span["name"] == FIRST_MOVE:
                found[str(_attributes(span).get("fedbus.run", ""))] = int(span["startTimeUnixNano"])
    return sorted(found, key=lambda run: found[run])


def read_trace(directory: Path, trace_id: str) -> Kept:
    """All that is kept of one trace."""
    return Kept(trace_id, [_only(one, trace_id) for one in _documents(directory, trace_id.encode())])


def _documents(directory: Path, holding: bytes) -> Iterator[Document]:
    """The lines that hold these bytes, read: most lines are of other traces, and reading them is the work."""
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            with path.open("rb") as file:
                for line in file:
                    if holding in line and (document := _document(line)) is not None:
                        yield document
        except OSError:  # it was dropped for its age meanwhile
            continue


def _document(line: bytes) -> Document | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "resourceSpans" in found else None


def _only(document: Document, trace_id: str) -> Document:
    resources = []
    for resource in document["resourceSpans"]:
        scopes = [
            {**scope, "spans": [span for span in scope["spans"] if span["traceId"] == trace_id]}
            for scope in resource["scopeSpans"]
        ]
        resources.append({**resource, "scopeSpans": [scope for scope in scopes if scope["spans"]]})
    return {"resourceSpans": resources}


def _spans(document: Document) -> Iterator[Document]:
    for resource in document["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            yield from scope["spans"]


def _traced(span: Document, service: str) -> Traced:
    return Traced(
        id=span["spanId"],
        name=span["name"],
        start=int(span["startTimeUnixNano"]) * NANO,
        end=int(span["endTimeUnixNano"]) * NANO,
        parent=span.get("parentSpanId", ""),
        links=tuple(link["spanId"] for link in span.get("links", ())),
        attributes={
            **_attributes(span),
            "service": service,
            "failed": span.get("status", {}).get("code") == 2,
        },
    )


def _attributes(of: Document) -> dict[str, Attribute]:
    return {one["key"]: _value(one["value"]) for one in of.get("attributes", ())}


def _value(value: Document) -> Attribute:
    kind, said = next(iter(value.items()))
    match kind:
        case "intValue":
            return int(said)
        case "boolValue" | "doubleValue" | "stringValue":
            return said  # type: ignore[no-any-return]
        case _:
            return str(said)
