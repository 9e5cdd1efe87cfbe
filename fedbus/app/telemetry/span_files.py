"""Spans on this machine's disk: what `fedbus trace` reads, with nothing else installed.

Every process appends to files of its own in FEDBUS_HOME/traces, so nothing is shared between them. A file
is a row of blocks: four bytes of length, then msgpack of what the process is and the spans of a second. A
block that was torn by a power cut is the last of its file, and is passed over (see `reading`). Not OTLP/JSON,
which costs ten times as much to write as the span did to make: `fedbus trace --otlp-json` makes that of it.

A span that lasts is told of twice: without an end by the block of the second in which it began, and whole when
it ends. So a run shows while it is under way, and what a process that was killed had in hand is known.

Bounded: a file is set aside at FILE_BYTES, and of all files the oldest go when they are more than was given.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import msgpack
import structlog

FILE_BYTES: Final = 8 * 1024**2
WAITING: Final = 8192
"""Spans that may wait to be written; the oldest go first."""
EVERY_S: Final = 1.0
STOP_S: Final = 2.0
SUFFIX: Final = ".spans"
LENGTH_BYTES: Final = 4

log = structlog.get_logger("fedbus.telemetry")


class Record(NamedTuple):
    """One span as it is kept: ids raw, times in nanoseconds, kinds and codes as OTLP numbers them.

    Its *end* is 0 as long as it is under way.
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


Made = Callable[[], Record]
"""Makes the record of a span that has ended: in the thread that writes it, for the one that ended it has other work."""


class Begun(Protocol):
    """A span from its beginning on."""

    def is_recording(self) -> bool:
        """Whether it has not ended."""

    def record(self) -> Record: ...


class Keeper:
    """Writes the spans of this process into *directory*, which holds *max_bytes* at the most."""

    def __init__(
        self,
        directory: Path,
        resource: Mapping[str, Any],
        *,
        max_bytes: int,
        file_bytes: int = FILE_BYTES,
        every_s: float = EVERY_S,
    ) -> None:
        self._directory = directory
        self._resource = dict(resource)
        self._max_bytes = max_bytes
        self._file_bytes = min(file_bytes, max_bytes)
        self._every_s = every_s
        self._name = f"{resource['service.name']}-{os.getpid()}-{time.time_ns():x}"
        self._part = 0
        self._begun: deque[Begun] = deque(maxlen=WAITING)
        self._waiting: deque[Made] = deque(maxlen=WAITING)
        self._work, self._closing = threading.Event(), threading.Event()
        self._rests = False
        self._writer = threading.Thread(target=self._write_all, name="keep spans", daemon=True)
        self._writer.start()

    def began(self, span: Begun) -> None:
        """Write that it is under way, if it still is in a moment. Never waits."""
        self._begun.append(span)
        if not self._work.is_set():
            self._work.set()

    def take(self, record: Made) -> None:
        """Write it in a moment. Never waits."""
        self._waiting.append(record)
        if not self._work.is_set():
            self._work.set()

    def close(self) -> None:
        """Write what waits, and end."""
        self._closing.set()
        self._work.set()
        self._writer.join(STOP_S)

    def _write_all(self) -> None:
        while not self._closing.is_set():
            self._work.wait()
            self._closing.wait(self._every_s)  # a second's spans are one block
            self._work.clear()
            self._write([*self._under_way(), *self._taken()])

    def _under_way(self) -> list[Record]:
        """What has begun since the last block and not ended: most spans have, and are told of once."""
        records = []
        with suppress(IndexError):
            while True:
                span = self._begun.popleft()
                if span.is_recording():
                    records.append(span.record())
        return records

    def _taken(self) -> list[Record]:
        records = []
        with suppress(IndexError):
            while True:
                records.append(self._waiting.popleft()())
        return records

    def _write(self, records: list[Record]) -> None:
        """A disk that is full or not ours is no reason to stop anything: it is said once, and tried again."""
        if not records:
            return
        try:
            self._append(block(self._resource, records))
        except OSError as error:
            if not self._rests:
                where = str(self._directory)
                log.warning("spans are not kept on this machine", directory=where, reason=str(error))
            self._rests = True
        else:
            self._rests = False

    def _append(self, written: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{self._name}-{self._part}{SUFFIX}"
        with path.open("ab") as file:
            is_new = file.tell() == 0
            file.write(written)
            full = file.tell() >= self._file_bytes
        self._part += full
        if full or is_new:
            prune(self._directory, self._max_bytes)


def block(resource: Mapping[str, Any], records: list[Record]) -> bytes:
    """What is appended to a file: the *records* of one process."""
    packed: bytes = msgpack.packb([resource, records], default=str)
    return len(packed).to_bytes(LENGTH_BYTES, "big") + packed


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
