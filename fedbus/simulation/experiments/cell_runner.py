"""Run the cells of an experiment: those without a result, on several processes, each result stored at once.

    cells ──▶ stored result with the same settings? ──yes──▶ reused
                    │ no
                    ▼
              process 1 … jobs ──▶ outcome ──▶ cells/<name>.json

A process computes many cells, so that it imports the libraries once. A cell that fails does not stop the others; a
process that dies fails its cell, and the next cell gets a new process.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol, Self

from fedbus.simulation.experiments import cell_process
from fedbus.simulation.experiments.cell_store import CellStore, CorruptCell
from fedbus.simulation.experiments.cells import Cell, CellRecord

STOP_S: Final = 3.0
"""Time for a process to end after SIGTERM. Then its process group is killed."""
COMMAND: Final = (sys.executable, "-m", cell_process.__name__)
MAX_FIRST_FAILURES: Final = 3
"""If so many cells fail and none succeeds, the others are not computed: they would fail too."""


class CellObserver(Protocol):
    """Follows the cells. All calls come from the thread that called `run_cells`."""

    def planned(self, cells: Sequence[Cell]) -> None:
        """Cells that have no stored result and will be computed."""

    def reused(self, cell: Cell) -> None: ...
    def corrupt(self, reason: str) -> None: ...
    def started(self, cell: Cell) -> None: ...
    def progressed(self, cell: Cell, share: float) -> None: ...
    def finished(self, cell: Cell, record: CellRecord) -> None: ...
    def failed(self, cell: Cell, reason: str) -> None: ...


@dataclass
class CellResults:
    """The results of all cells, in the order of the cells."""

    records: list[CellRecord] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Reasons by the cell's name."""

    def add(self, others: "CellResults") -> None:
        """Append the results of *others*."""
        self.records += others.records
        self.failures |= others.failures


@dataclass(frozen=True)
class _Event:
    cell: Cell
    kind: str
    share: float = 0.0
    outcome: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    wall_s: float = 0.0


def run_cells(
    cells: Sequence[Cell],
    store: CellStore,
    *,
    jobs: int,
    logs: Path,
    observer: CellObserver,
    fresh: bool = False,
) -> CellResults:
    """Compute the *cells* that have no stored result, *jobs* at once, and store each result.

    *fresh*: compute all of them. If the first `MAX_FIRST_FAILURES` cells fail, the others are not computed.
    KeyboardInterrupt stops the processes and passes; the stored results stay.
    """
    stored = {} if fresh else dict(_load_stored(cells, store, observer))
    stored_before = len(stored)
    pending = [cell for cell in cells if cell.digest not in stored]
    observer.planned(pending)
    results = CellResults()
    with _Slots(jobs, pending, logs) as slots:
        for event in slots.events():
            match event.kind:
                case "started":
                    observer.started(event.cell)
                case "progress":
                    observer.progressed(event.cell, event.share)
                case "done":
                    record = _make_record(event)
                    store.save(event.cell, record)
                    stored[event.cell.digest] = record
                    observer.finished(event.cell, record)
                case _:
                    results.failures[event.cell.name] = event.reason
                    observer.failed(event.cell, event.reason)
                    if len(results.failures) >= MAX_FIRST_FAILURES and len(stored) == stored_before:
                        break
    results.records = [stored[cell.digest] for cell in cells if cell.digest in stored]
    return results


def _load_stored(
    cells: Iterable[Cell], store: CellStore, observer: CellObserver
) -> Iterator[tuple[str, CellRecord]]:
    for cell in cells:
        try:
            record = store.load(cell)
        except CorruptCell as error:
            observer.corrupt(str(error))
            continue
        if record is not None:
            observer.reused(cell)
            yield cell.digest, record


def _make_record(event: _Event) -> CellRecord:
    return CellRecord(
        digest=event.cell.digest,
        factors=event.cell.factors,
        settings=event.cell.settings,
        outcome=event.outcome,
        wall_s=round(event.wall_s, 3),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class _Slots:
    """Threads with one process each, which take the next cell as soon as they are free."""

    def __init__(self, jobs: int, cells: Sequence[Cell], logs: Path) -> None:
        self._pending: queue.SimpleQueue[Cell | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._count = len(cells)
        for cell in cells:
            self._pending.put(cell)
        slots = min(jobs, len(cells))
        if slots:
            logs.mkdir(parents=True, exist_ok=True)
        self._slots = [_Slot(logs / f"process-{number}.log") for number in range(1, slots + 1)]
        self._threads = [
            threading.Thread(target=self._serve, args=[slot], name="cell-slot", daemon=True)
            for slot in self._slots
        ]
        self._is_stopped = False

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped = True
        for _slot in self._slots:
            self._pending.put(None)
        for slot in self._slots:
            slot.terminate()
        for slot, thread in zip(self._slots, self._threads, strict=True):
            thread.join(STOP_S)
            slot.kill()

    def events(self) -> Iterator[_Event]:
        """Yield the events of all cells, until each is done or has failed."""
        open_cells = self._count
        while open_cells:
            event = self._events.get()
            open_cells -= event.kind in {"done", "failed"}
            yield event

    def _serve(self, slot: "_Slot") -> None:
        while not self._is_stopped and (cell := self._pending.get()) is not None:
            self._events.put(_Event(cell, "started"))
            for event in slot.compute(cell):
                self._events.put(event)


class _Slot:
    """One process that computes cells."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def compute(self, cell: Cell) -> Iterator[_Event]:
        """Yield the events of *cell*; the last one is ``done`` or ``failed``."""
        started = time.monotonic()
        try:
            process = self._open()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(cell.model_dump_json() + "\n")
            process.stdin.flush()
            for line in process.stdout:
                message = json.loads(line)
                match message["event"]:
                    case "progress":
                        yield _Event(cell, "progress", share=float(message["share"]))
                    case "done":
                        seconds = time.monotonic() - started
                        yield _Event(cell, "done", outcome=message["outcome"], wall_s=seconds)
                        return
                    case _:
                        yield _Event(cell, "failed", reason=message["reason"])
                        return
        except BrokenPipeError:
            pass
        except OSError as error:
            yield _Event(cell, "failed", reason=f"its process cannot start: {error.strerror or error}")
            return
        yield _Event(cell, "failed", reason=self._describe_end())

    def terminate(self) -> None:
        """Ask the process to end."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill the process and its workers if they have not ended, and release it."""
        if self._process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._process = None

    def _open(self) -> "subprocess.Popen[str]":
        if self._process is None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    encoding="utf-8",
                    process_group=0,  # Ctrl-C reaches only the parent, which stops the process
                )
        return self._process

    def _describe_end(self) -> str:
        """Describe why the process has ended, and forget it: the next cell starts a new one."""
        assert self._process is not None
        code = self._process.wait()
        self.kill()
        if code == -signal.SIGKILL:
            return f"its process was killed, probably since the memory was full. The log is {self._log}"
        return f"its process ended with exit code {code}. The log is {self._log}"
