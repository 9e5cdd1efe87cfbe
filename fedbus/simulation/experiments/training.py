"""A cell that simulates one run of a task, and what it keeps of the result."""

import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from fedbus.contracts.run import RoundResult
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning.data import load_dataset, partition_labels
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.weights import Arrays
from fedbus.simulation.experiments.cell_process import ReportProgress
from fedbus.simulation.experiments.cells import Cell, CellOutcome, CellRecord, Level
from fedbus.simulation.experiments.errors import InvalidExperiment, require_package
from fedbus.simulation.observer import SilentObserver
from fedbus.simulation.profiles.reader import load_profile, profile_text
from fedbus.simulation.profiles.schema import Profile
from fedbus.simulation.settings import SimulationResult, SimulationSettings
from fedbus.stores.tasks.task_directory import content_version, read_task

FUNCTION: Final = f"{__name__}:simulate_cell"
APPS: Final = Path(__file__).parent / "apps"
VISION: Final = APPS / "vision"
"""The task of the experiments: image classification with the library `functions` and torch."""
DATA_DIR_VARIABLE: Final = "FEDBUS_DATA_DIR"
CPU_TIME: Final = "train_cpu_s"
"""The CPU time of a training in seconds, which other processes do not change; the task `vision` reports it."""
LOCAL_ACCURACY: Final = "train_accuracy"
"""The accuracy of a client's own model after its training; the task `vision` reports it."""


def training_cell(
    factors: Mapping[str, Level],
    *,
    task: Path = VISION,
    table: Mapping[str, Any] | None = None,
    config: Mapping[str, bool | int | float | str] | None = None,
    clients: int,
    rounds: int,
    seed: int,
    cohort: int | None = None,
    partition: str | None = None,
    data_dir: Path | None = None,
    profile: Mapping[str, Any] | None = None,
    workers: int = 1,
    cost: float = 1.0,
) -> Cell:
    """Return the cell of one run of the task in the directory *task*, named by *factors*.

    *table* has keys of ``[tool.fedbus]`` that replace those of the task; tables are merged. *config* overrides the
    app's run configuration. With a *profile*, the clock is virtual. *cost* is the expected computing time, relative to
    other cells. The other arguments are those of `SimulationSettings`.

    Raises:
        BadTask, LibraryUnusable: the task cannot be read.
        InvalidExperiment: *table* is invalid.
        ExperimentFailed: the task `vision` needs torch, which is not installed.

    """
    if task.resolve() == VISION.resolve():
        require_package("torch", extra="torch")
    settings: dict[str, Any] = {
        "task": str(task.resolve()),
        "code": task_version(task),
        "table": dict(table or {}),
        "config": dict(config or {}),
        "clients": clients,
        "cohort": cohort,
        "rounds": rounds,
        "seed": seed,
        "partition": partition,
        "data_dir": str(data_dir.resolve()) if data_dir is not None else None,
        "profile": profile,
        "workers": workers,
    }
    apply_table(load_task(task), settings["table"])
    return Cell(factors=dict(factors), function=FUNCTION, settings=settings, cost=cost)


@cache
def load_task(path: Path) -> Task:
    """Read the task at *path*. Raises BadTask, LibraryUnusable."""
    return read_task(path, open_library)


@cache
def task_version(path: Path) -> str:
    """Return the version of the task's code, which commits of other files do not change."""
    return content_version(path)


def apply_table(task: Task, changes: Mapping[str, Any]) -> Task:
    """Return *task* with *changes* of its ``[tool.fedbus]``.

    Raises:
        InvalidExperiment: a key or a value is invalid.

    """
    table = merge(task.table.model_dump(mode="json", exclude_unset=True), changes)
    try:
        return task.model_copy(update={"table": TaskTable.model_validate(table)})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InvalidExperiment(
            f"{key or 'the configuration'} of [tool.fedbus] is invalid: {first['msg']}"
        ) from None


def merge(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return *table* with *changes*; tables in them are merged."""
    merged = dict(table)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def simulate_cell(settings: dict[str, Any], report_progress: ReportProgress) -> CellOutcome:
    """Simulate the run of a cell's *settings*, and keep what tables and plots need."""
    from fedbus.simulation.simulator import simulate  # noqa: PLC0415 - the parent of the cells does not need it

    observer = ProgressObserver(settings["rounds"], report_progress)
    return summarize(simulate(simulation_settings(settings), observer=observer))


def simulation_settings(settings: Mapping[str, Any]) -> SimulationSettings:
    """Return the settings of the simulation of a cell.

    Raises:
        DataError: the task `vision` has no data, or they cannot be divided among these clients.

    """
    data_dir = settings["data_dir"]
    if data_dir is not None:
        os.environ[DATA_DIR_VARIABLE] = data_dir  # the server side of an app has no node configuration
    task = apply_table(load_task(Path(settings["task"])), settings["table"])
    # `initial` gets the task's own configuration, not that of a run
    task = task.model_copy(update={"run_config": {**task.run_config, **settings["config"]}})
    prepare_partitions(task, settings)
    profile = settings["profile"]
    return SimulationSettings(
        task=task,
        clients=settings["clients"],
        cohort=settings["cohort"],
        rounds=settings["rounds"],
        seed=settings["seed"],
        deterministic=settings["profile"] is None and settings["workers"] == 1,
        workers=settings["workers"],
        config=settings["config"],
        partition=settings["partition"],
        data_dir=Path(data_dir) if data_dir is not None else None,
        profile=read_profile(profile) if profile is not None else None,
    )


def name_profile(source: str) -> dict[str, Any]:
    """Return the profile *source*, a file or a built-in one, for the settings of a cell.

    Raises:
        ProfileError: it does not exist, or is invalid.

    """
    load_profile(source)
    return {"source": source, "text": profile_text(source)}


def read_profile(settings: Mapping[str, Any]) -> Profile:
    """Return the profile of a cell: the keys of one, or those of `name_profile`."""
    return load_profile(settings["source"]) if "source" in settings else Profile.model_validate(settings)


def prepare_partitions(task: Task, settings: Mapping[str, Any]) -> None:
    """Compute the partitions of the task `vision` before its run; the clients read them from the cache.

    Otherwise the first client would compute them, and import the partitioners, in its training time.
    """
    if Path(task.path).resolve() == VISION.resolve():
        labels = load_dataset(str(task.run_config["dataset"])).train.labels
        partition_labels(labels, settings["partition"] or "iid", settings["clients"], seed=settings["seed"])


def summarize(result: SimulationResult) -> CellOutcome:
    """Return the outcome of a run as JSON values."""
    at_s, rounds = 0.0, []
    for one in result.rounds:
        at_s += one.seconds
        rounds.append(
            {
                "round": one.round,
                "at_s": round(at_s, 4),
                "loss": finite(one.loss),
                "accuracy": finite(one.accuracy),
                "local_accuracy": finite(mean_figure(one, LOCAL_ACCURACY)),
                "train_s": mean(list(one.train_s.values())),
                "cpu_s_by_client": {
                    client: round(figures[CPU_TIME], 4)
                    for client, figures in one.figures.items()
                    if CPU_TIME in figures
                },
                "train_s_by_client": {client: round(value, 4) for client, value in one.train_s.items()},
                "updates": one.updates or len(one.participants),
                "failures": one.failures,
            }
        )
    return {
        "rounds": rounds,
        "simulated_s": round(result.simulated_s, 4),
        "seconds": round(result.seconds, 3),
        "peak_memory_mb": round(result.peak_memory_bytes / 1e6, 1),
    }


def mean_figure(result: RoundResult, name: str) -> float | None:
    """Return the mean of a metric over the clients that reported it."""
    return mean([figures[name] for figures in result.figures.values() if name in figures])


def finite(value: float | None) -> float | None:
    """Return *value* if it is a finite number, which JSON can store, else None."""
    return value if value is not None and math.isfinite(value) else None


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --- reading outcomes -------------------------------------------------------------------------


def final_value(record: CellRecord, name: str) -> float:
    """Return the value *name* of the last round that has it; NaN if none has it."""
    for one in reversed(record.outcome["rounds"]):
        if one.get(name) is not None:
            return float(one[name])
    return float("nan")


def curve(record: CellRecord, name: str, *, over: str = "round") -> tuple[list[float], list[float]]:
    """Return the values *over* and *name* of all rounds that have both."""
    points = [
        (float(one[over]), float(one[name])) for one in record.outcome["rounds"] if one.get(name) is not None
    ]
    return [x for x, _ in points], [y for _, y in points]


class ProgressObserver(SilentObserver):
    """Reports the share of finished rounds."""

    def __init__(self, rounds: int, report_progress: ReportProgress) -> None:
        self._rounds = rounds
        self._report_progress = report_progress

    def on_round(self, result: RoundResult, model: Arrays) -> None:
        del model
        self._report_progress(min(1.0, result.round / self._rounds))
