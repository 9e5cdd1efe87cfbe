"""The progress of an experiment: a bar with the remaining time on a terminal, a line for each cell in a pipe."""

from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from fedbus.simulation.experiments.cells import Cell, CellRecord
from fedbus.simulation.experiments.report import format_seconds

MIN_SHARE: Final = 0.01
"""The share of the work that must be done before the remaining time is estimated."""
MAX_RUNNING: Final = 2


class ExperimentProgress:
    """Shows the cells of an experiment on *console*, which is standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[cells]} cells"),
            TimeElapsedColumn(),
            _RemainingTime(),
            console=console,
            transient=True,
            disable=not self._is_live,
        )
        self._bar = self._progress.add_task("starting", total=1.0, done=0, cells=0)
        self._cells: dict[str, Cell] = {}
        self._shares: dict[str, float] = {}
        self._running: list[str] = []
        self.reused_count = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    # --- `CellObserver` -----------------------------------------------------------------------

    def planned(self, cells: Sequence[Cell]) -> None:
        self._cells |= {cell.name: cell for cell in cells}
        self._show()

    def reused(self, cell: Cell) -> None:
        del cell
        self.reused_count += 1

    def corrupt(self, reason: str) -> None:
        self._print(f"{reason}: the cell is computed again")

    def started(self, cell: Cell) -> None:
        self._running.append(cell.name)
        self._show()

    def progressed(self, cell: Cell, share: float) -> None:
        self._shares[cell.name] = share
        self._show()

    def finished(self, cell: Cell, record: CellRecord) -> None:
        self._end(cell)
        if not self._is_live:
            done = sum(share >= 1 for share in self._shares.values())
            self._print(f"{done}/{len(self._cells)} {cell.name}: {format_seconds(record.wall_s)}")

    def failed(self, cell: Cell, reason: str) -> None:
        self._end(cell)
        self._print(f"{cell.name} failed: {reason}")

    # --- display ------------------------------------------------------------------------------

    def _end(self, cell: Cell) -> None:
        self._shares[cell.name] = 1.0
        if cell.name in self._running:
            self._running.remove(cell.name)
        self._show()

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _show(self) -> None:
        total = sum(cell.cost for cell in self._cells.values())
        done = sum(self._cells[name].cost * share for name, share in self._shares.items())
        names = ", ".join(self._running[:MAX_RUNNING])
        self._progress.update(
            self._bar,
            total=total or 1.0,
            completed=done,
            description=names,
            done=sum(share >= 1 for share in self._shares.values()),
            cells=len(self._cells),
        )


class _RemainingTime(ProgressColumn):
    """The time left, if all cells go on as fast as those until now."""

    def render(self, task: Task) -> Text:
        elapsed, total = task.elapsed or 0.0, task.total or 1.0
        share = task.completed / total
        if share < MIN_SHARE or elapsed < 1:
            return Text("")
        return Text(f"about {format_seconds(elapsed / share - elapsed)} left", style="progress.remaining")
