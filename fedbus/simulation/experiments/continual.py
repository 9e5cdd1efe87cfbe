"""Hong & Lee, figure 20: periodic runs of one task, each of which continues with the model of the last one.

Five runs of four rounds; MNIST, three fully connected layers, batches of 32, two epochs a round. The loss of a run
begins where that of the run before it ended, since the first evaluation of a run is that of the stored model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedbus.simulation.experiments.cell_process import ReportProgress
from fedbus.simulation.experiments.cells import Cell, CellOutcome, CellRecord
from fedbus.simulation.experiments.datasets import find_datasets
from fedbus.simulation.experiments.plot_style import COLORS, label_axes
from fedbus.simulation.experiments.report import ExperimentReport, Finding, Plot, ReportTable
from fedbus.simulation.experiments.training import (
    ProgressObserver,
    simulation_settings,
    summarize,
    training_cell,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUNCTION: Final = f"{__name__}:simulate_runs"
ROUNDS: Final = 4
RUNS: Final = 5
CLIENTS: Final = 3
IMAGES: Final = 3000
QUICK_IMAGES: Final = 300
TOLERANCE: Final = 1e-6
"""The largest difference of two losses of one model, relative to their size."""


def simulate_runs(settings: dict[str, Any], report_progress: ReportProgress) -> CellOutcome:
    """Simulate several runs, each with the final model of the run before it."""
    from fedbus.simulation.simulator import simulate  # noqa: PLC0415 - the parent of the cells does not need it

    count = settings["runs"]
    current, runs = simulation_settings(settings), []
    for number in range(1, count + 1):
        done = number - 1
        observer = ProgressObserver(
            ROUNDS,
            lambda share, done=done: report_progress((done + share) / count),  # type: ignore[misc]
        )
        result = simulate(replace(current, run=f"run-{number}"), observer=observer)
        runs.append(summarize(result))
        current = replace(current, model=result.model, seed=(current.seed or 0) + 1)
    return {"runs": runs}


@dataclass(frozen=True)
class ContinualExperiment:
    """Figure 20."""

    seeds: Sequence[int]
    data_dir: Path | None = None
    is_quick: bool = False

    @property
    def images(self) -> int:
        return QUICK_IMAGES if self.is_quick else IMAGES

    def plan(self, records: Sequence[CellRecord]) -> Sequence[Cell]:
        """Return one cell for each seed: its runs depend on each other."""
        del records
        find_datasets(["mnist"], self.data_dir)
        return [self._cell(seed) for seed in self.seeds]

    def _cell(self, seed: int) -> Cell:
        cell = training_cell(
            {"seed": seed},
            config={
                "model": "mlp",
                "local-epochs": 2,
                "lr": 0.01,
                "momentum": 0.0,
                "max-samples": self.images,
                "seed": seed,
            },
            clients=CLIENTS,
            rounds=ROUNDS,
            seed=seed * 1000,
            data_dir=self.data_dir,
        )
        return cell.model_copy(update={"function": FUNCTION, "settings": {**cell.settings, "runs": RUNS}})

    def report(self, records: Sequence[CellRecord]) -> ExperimentReport:
        """Report the losses of all runs."""
        gaps = [
            _gap(first, second) for record in records for first, second in pairwise(record.outcome["runs"])
        ]
        is_continuous = all(gap <= TOLERANCE for gap in gaps)
        ends = [one.outcome["runs"][0]["rounds"][0]["loss"] for one in records]
        lasts = [one.outcome["runs"][-1]["rounds"][-1]["loss"] for one in records]
        return ExperimentReport(
            title="Periodic runs: each run continues with the model of the last one",
            setting=[
                f"{RUNS} runs of {ROUNDS} rounds, {CLIENTS} clients with {self.images} images of MNIST each",
                "three fully connected layers (784-128-64-10), batches of 32, 2 epochs a round, SGD",
                "round 0 of a run is the evaluation of the model that it begins with",
            ],
            findings=[
                Finding(
                    f"each run begins with the loss that the last one ended with (largest difference {max(gaps):.1e})",
                    is_met=is_continuous,
                ),
                Finding(
                    f"the loss falls from {ends[0]:.3f} to {lasts[0]:.3f} over {RUNS} runs",
                    is_met=all(last < first for first, last in zip(ends, lasts, strict=True)),
                ),
            ],
            tables=[_table(records[0])],
            plots=[Plot("loss.png", "Loss over all runs", lambda figure: _draw(figure, records), (9.0, 4.5))],
            rows=[
                {
                    **record.factors,
                    "run": number,
                    "round": one["round"],
                    "loss": one["loss"],
                    "accuracy": one["accuracy"],
                }
                for record in records
                for number, run in enumerate(record.outcome["runs"], start=1)
                for one in run["rounds"]
            ],
        )


def _gap(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Return the relative difference between the last loss of *first* and the loss that *second* begins with."""
    end, start = first["rounds"][-1]["loss"], second["rounds"][0]["loss"]
    if end is None or start is None or second["rounds"][0]["round"] != 0:
        return math.inf
    return float(abs(end - start) / max(abs(end), 1e-12))


def _table(record: CellRecord) -> ReportTable:
    rows = []
    for number, run in enumerate(record.outcome["runs"], start=1):
        losses = [one["loss"] for one in run["rounds"]]
        rows.append(
            [f"run {number}", *(f"{loss:.4f}" for loss in losses), f"{run['rounds'][-1]['accuracy']:.2%}"]
        )
    headings = ["run", "start", *(f"round {number}" for number in range(1, ROUNDS + 1)), "accuracy"]
    return ReportTable(f"Loss on the test set, seed {record.factors['seed']}", headings, rows)


def _draw(figure: "Figure", records: Sequence[CellRecord]) -> None:
    """Draw the loss of all runs in one line of rounds; the runs meet where one ends and the next begins."""
    axes = figure.subplots()
    for index, record in enumerate(records):
        for number, run in enumerate(record.outcome["runs"]):
            at = [number * ROUNDS + one["round"] for one in run["rounds"]]
            label = f"run {number + 1}" if index == 0 else None
            axes.plot(
                at,
                [one["loss"] for one in run["rounds"]],
                "o-",
                color=COLORS[number],
                label=label,
                markersize=4,
            )
    for number in range(1, RUNS):
        axes.axvline(number * ROUNDS, color="0.8", linewidth=1)
    label_axes(
        axes, x="round, over all runs", y="loss on the test set", title="MNIST, five runs of four rounds"
    )
    axes.set_xticks(range(0, RUNS * ROUNDS + 1, ROUNDS // 2))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")
