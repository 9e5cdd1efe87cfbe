"""What an experiment is: a grid of cells, and the report of their outcomes."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from fedbus.simulation.experiments.cell_runner import CellObserver, CellResults, run_cells
from fedbus.simulation.experiments.cell_store import CellStore
from fedbus.simulation.experiments.cells import Cell, CellRecord, Level
from fedbus.simulation.experiments.errors import ExperimentFailed, require_package
from fedbus.simulation.experiments.report import ExperimentReport, ReportContext, write_report

LevelT = TypeVar("LevelT", bound=Level)


class Experiment(Protocol):
    """An experiment with its options."""

    @property
    def seeds(self) -> Sequence[int]: ...

    def plan(self, records: Sequence[CellRecord]) -> Sequence[Cell]:
        """Return all cells that can be planned with *records*, the results so far; none at first.

        Raises:
            ExperimentFailed: an option or the data do not allow the experiment.

        """

    def report(self, records: Sequence[CellRecord]) -> ExperimentReport:
        """Report the outcomes. Cells that failed are missing."""


def grid(**factors: Sequence[Level]) -> Iterator[dict[str, Level]]:
    """Yield all combinations of the factors' levels; the last factor changes fastest."""
    for levels in itertools.product(*factors.values()):
        yield dict(zip(factors, levels, strict=True))


def seeds_from(first: int, count: int) -> list[int]:
    """Return *count* seeds from *first* on."""
    return list(range(first, first + count))


def run_experiment(
    experiment: Experiment,
    output: Path,
    *,
    jobs: int,
    command: str,
    observer: CellObserver,
    fresh: bool = False,
) -> "FinishedExperiment":
    """Compute all cells in *output*, and write the report.

    Raises:
        ExperimentFailed: an option is invalid, a package is missing, or no cell has a result.

    """
    check_packages()
    store, logs = CellStore(output), output / "logs"
    results, planned = CellResults(), set[str]()
    while new := [cell for cell in experiment.plan(results.records) if cell.digest not in planned]:
        check_names(new)
        planned |= {cell.digest for cell in new}
        results.add(run_cells(new, store, jobs=jobs, logs=logs, observer=observer, fresh=fresh))
        if len(results.records) + len(results.failures) < len(planned):
            raise ExperimentFailed(
                f"the first {len(results.failures)} cells failed, so the others were not computed. {_describe(results)}"
            )
    if not results.records:
        raise ExperimentFailed(f"no cell has a result. {_describe(results)}")
    report = experiment.report(results.records)
    wall_s = sum(record.wall_s for record in results.records)
    context = ReportContext(command, experiment.seeds, wall_s, results.failures)
    return FinishedExperiment(report, results, write_report(report, results.records, context, output))


def _describe(results: CellResults) -> str:
    name, reason = next(iter(results.failures.items()))
    return f"The cell {name} failed: {reason}"


class FinishedExperiment:
    """The report and the written files."""

    def __init__(self, report: ExperimentReport, results: CellResults, files: Sequence[Path]) -> None:
        self.report = report
        self.results = results
        self.files = files


def check_packages() -> None:
    """Check that plots can be drawn, before hours of computing. Raises ExperimentFailed."""
    require_package("matplotlib", extra="simulation")


def check_names(cells: Sequence[Cell]) -> None:
    """Check that no two cells have the same file. Raises ExperimentFailed."""
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ExperimentFailed(f"two cells have the name {double!r}: the levels of a factor are too similar")
