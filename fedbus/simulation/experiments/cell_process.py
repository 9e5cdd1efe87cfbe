"""A process that computes cells, one after the other.

The parent writes one cell a line to standard input; this process answers with lines of JSON on standard output:

    {"event": "progress", "share": 0.4}      any number of times
    {"event": "done", "outcome": {…}}        or  {"event": "failed", "reason": "…"}

What the code of a task prints goes to standard error, which the parent writes to a log file. The process ends when
its standard input ends, also in the middle of a cell: it does not outlive its parent.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, TypeAlias

from fedbus.simulation.experiments.cells import Cell, CellOutcome

MAX_REASON_CHARS: Final = 500

ReportProgress: TypeAlias = Callable[[float], None]
"""Reports the computed share of a cell, 0 … 1."""
CellFunction: TypeAlias = Callable[[dict[str, Any], ReportProgress], CellOutcome]


def resolve_function(reference: str) -> CellFunction:
    """Import the function of a cell, given as ``module:name``."""
    module, _, name = reference.partition(":")
    function: CellFunction = getattr(import_module(module), name)
    return function


def compute_cell(cell: Cell, report_progress: ReportProgress) -> CellOutcome:
    """Compute the outcome of *cell* in this process."""
    outcome = resolve_function(cell.function)(cell.settings, report_progress)
    json.dumps(
        outcome, allow_nan=False
    )  # an outcome that is not JSON is an error of this cell, not of the report
    return outcome


def describe_failure(error: BaseException) -> str:
    """Describe *error* in one line."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, OSError | RuntimeError | ValueError | LookupError | TypeError | AssertionError):
        text = f"{type(error).__name__}: {text}"
    return text[:MAX_REASON_CHARS]


def main() -> None:
    """Compute the cells of standard input."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the code of a task may print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, _exit)
    cells: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_cells, args=[cells], name="cells", daemon=True).start()

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

    while (line := cells.get()) is not None:
        try:
            cell = Cell.model_validate_json(line)
            outcome = compute_cell(cell, lambda share: answer(event="progress", share=share))
        except Exception as error:  # noqa: BLE001 - any error is the result of this cell
            traceback.print_exc()
            answer(event="failed", reason=describe_failure(error))
        else:
            answer(event="done", outcome=outcome)


def _read_cells(cells: "queue.SimpleQueue[str | None]") -> None:
    for line in sys.stdin:
        cells.put(line)
    cells.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def _exit(_signal: int, _frame: object) -> None:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
