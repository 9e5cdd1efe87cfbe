"""Cells in processes: results, failures, resumption, and the end by Ctrl-C."""

import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from support import experiment_cells

from fedbus.simulation.experiments.cell_runner import CellResults, run_cells
from fedbus.simulation.experiments.cell_store import CellStore
from fedbus.simulation.experiments.cells import Cell, CellRecord

TESTS = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of the cells import the functions of the tests."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


class RecordingObserver:
    """Records the calls."""

    def __init__(self, *, interrupt_at: str = "") -> None:
        self.calls: list[tuple[str, str]] = []
        self._interrupt_at = interrupt_at

    def planned(self, cells: Sequence[Cell]) -> None:
        self._record("planned", str(len(cells)))

    def reused(self, cell: Cell) -> None:
        self._record("reused", cell.name)

    def corrupt(self, reason: str) -> None:
        self._record("corrupt", reason)

    def started(self, cell: Cell) -> None:
        self._record("started", cell.name)

    def progressed(self, cell: Cell, share: float) -> None:
        self._record("progressed", f"{cell.name} {share}")

    def finished(self, cell: Cell, record: CellRecord) -> None:
        self._record("finished", cell.name)

    def failed(self, cell: Cell, reason: str) -> None:
        self._record("failed", reason)

    def _record(self, name: str, detail: str) -> None:
        self.calls.append((name, detail))
        if name == self._interrupt_at:
            raise KeyboardInterrupt

    def of(self, name: str) -> list[str]:
        return [detail for kind, detail in self.calls if kind == name]


def cell(name: str, value: object, function: str = "double") -> Cell:
    return Cell(
        factors={"name": name}, function=experiment_cells.REFERENCE + function, settings={"value": value}
    )


def run(cells: Sequence[Cell], output: Path, observer: RecordingObserver, *, jobs: int = 1) -> CellResults:
    return run_cells(cells, CellStore(output), jobs=jobs, logs=output / "logs", observer=observer)


def test_results_come_in_the_order_of_the_cells(tmp_path: Path) -> None:
    observer = RecordingObserver()
    cells = [cell("a", 1), cell("b", 2), cell("c", 3)]
    results = run(cells, tmp_path, observer, jobs=2)
    assert [record.outcome["value"] for record in results.records] == [2, 4, 6]
    assert not results.failures
    assert sorted(observer.of("finished")) == ["name=a", "name=b", "name=c"]
    assert "name=a 0.5" in observer.of("progressed")
    assert "the app prints" in (tmp_path / "logs/process-1.log").read_text()


def test_failed_cells_do_not_stop_the_others(tmp_path: Path) -> None:
    observer = RecordingObserver()
    cells = [cell("a", 1, "fail"), cell("d", 4), cell("b", 1, "die"), cell("c", 1, "return_nan")]
    results = run(cells, tmp_path, observer)
    assert [record.outcome["value"] for record in results.records] == [8]
    assert results.failures["name=a"] == "ValueError: bad value 1"
    assert results.failures["name=b"].startswith(
        "its process was killed, probably since the memory was full."
    )
    assert "not JSON compliant" in results.failures["name=c"]
    assert "bad value 1" in (tmp_path / "logs/process-1.log").read_text()


def test_no_more_cells_run_if_the_first_ones_fail(tmp_path: Path) -> None:
    cells = [cell(str(number), number, "fail") for number in range(5)]
    results = run(cells, tmp_path, RecordingObserver())
    assert len(results.failures) == 3
    assert not results.records


def test_an_interrupted_experiment_continues(tmp_path: Path) -> None:
    cells = [cell("a", 1), cell("b", 2), cell("c", 3)]
    with pytest.raises(KeyboardInterrupt):
        run(cells, tmp_path, RecordingObserver(interrupt_at="finished"))
    (tmp_path / "cells/name=b.json").write_text("{")
    observer = RecordingObserver()
    results = run(cells, tmp_path, observer)
    assert [record.outcome["value"] for record in results.records] == [2, 4, 6]
    assert observer.of("reused") == ["name=a"]
    assert observer.of("planned") == ["2"]
    assert observer.of("started") == ["name=b", "name=c"]
    [reason] = observer.of("corrupt")
    assert "name=b.json is not the result of a cell" in reason


def test_nothing_starts_if_all_cells_have_results(tmp_path: Path) -> None:
    cells = [cell("a", 1)]
    run(cells, tmp_path, RecordingObserver())
    observer = RecordingObserver()
    assert [one.outcome["value"] for one in run(cells, tmp_path, observer).records] == [2]
    assert observer.of("started") == []


def test_an_interruption_ends_the_processes(tmp_path: Path) -> None:
    started = tmp_path / "started"
    slow = Cell(
        factors={"name": "slow"},
        function=experiment_cells.REFERENCE + "wait",
        settings={"started": str(started)},
    )

    class StopWhenStarted(RecordingObserver):
        def started(self, cell: Cell) -> None:
            while not (started.exists() and started.read_text()):  # the cell runs now
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([slow], tmp_path, StopWhenStarted())
    assert not psutil.pid_exists(int(started.read_text()))
