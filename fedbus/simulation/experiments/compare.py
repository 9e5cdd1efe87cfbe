"""Compare two algorithms or configurations: the same task, partitions and seeds, with confidence intervals.

Both sides of a pair have the same seed, so they begin with the same weights on the same partitions and the difference
within a pair has less chance in it than the difference of two means.
"""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedbus.contracts.task.aggregation import AggregationMode, StrategyName
from fedbus.contracts.task.run_config import InvalidOverride, parse_override_of
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.simulation.experiments.cells import Cell, CellRecord, matches
from fedbus.simulation.experiments.datasets import find_datasets
from fedbus.simulation.experiments.errors import InvalidExperiment
from fedbus.simulation.experiments.experiment import grid
from fedbus.simulation.experiments.plot_style import COLORS, label_axes
from fedbus.simulation.experiments.report import ABSENT, ExperimentReport, Finding, Plot, ReportTable
from fedbus.simulation.experiments.statistics import Estimate, estimate_difference, estimate_mean
from fedbus.simulation.experiments.training import (
    VISION,
    curve,
    final_value,
    load_task,
    training_cell,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCAFFOLD: Final = "scaffold"
METRICS: Final = ("accuracy", "loss", "local_accuracy")
FUNCTIONS_LIBRARY: Final = "functions"
STRATEGY_KEY: Final = "strategy"
"""The key of the run configuration by which an app of another library chooses its strategy, as in examples/mnist."""


@dataclass(frozen=True)
class Variant:
    """One side of a comparison."""

    name: str
    task: Path
    table: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, bool | int | float | str] = field(default_factory=dict)


def parse_variant(text: str, task: Path) -> Variant:
    """Parse one side of a comparison.

    It is the directory of a task; or a strategy or an aggregation mode; or ``key=value``, several separated by commas,
    where a key with a dot such as ``aggregation.eta`` belongs to ``[tool.fedbus]`` and others to the run configuration.

    Raises:
        InvalidExperiment: it is none of these, or the task has no such key.
        BadTask, LibraryUnusable: the task cannot be read.

    """
    if (Path(text) / "pyproject.toml").is_file():
        return Variant(Path(text).resolve().name, Path(text))
    loaded = load_task(task)
    if "=" in text:
        table, config = parse_settings(text, loaded)
        return Variant(text, task, table, config)
    return Variant(text, task, *_parse_strategy(text, loaded))


def parse_settings(text: str, task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse ``key=value,key=value``: changes of ``[tool.fedbus]``, and of the run configuration.

    Raises:
        InvalidExperiment: it has another form, or the task has no such key.

    """
    table: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise InvalidExperiment(f"{pair!r} is not key=value")
        section, dot, name = key.partition(".")
        if dot and section in _table_names() and key not in task.run_config:
            table.setdefault(section, {})[name] = parse_value(value)
            continue
        try:
            config[key] = parse_override_of(task.run_config, key, value)
        except InvalidOverride as error:
            hint = (
                ""
                if key in task.run_config
                else ". Keys of [tool.fedbus] have the form aggregation.strategy=fedadam"
            )
            raise InvalidExperiment(f"task {task.id}: {error}{hint}") from None
    return table, config


def parse_value(text: str) -> bool | int | float | str:
    """Parse a TOML value; a text needs no quotes."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _parse_strategy(text: str, task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
    name = text.lower()
    if name in set(AggregationMode):
        return {"aggregation": {"mode": name}}, {}
    if task.table.library == FUNCTIONS_LIBRARY:
        if name in set(StrategyName):
            return {"aggregation": {"strategy": name}}, {}
        if name == SCAFFOLD and Path(task.path).resolve() == VISION.resolve():
            return {"functions": "vision.scaffold"}, {}
        known = [*StrategyName, *AggregationMode]
        known += [SCAFFOLD] if Path(task.path).resolve() == VISION.resolve() else []
        raise InvalidExperiment(
            f"{text!r} is no strategy, mode or directory of a task. Use one of {', '.join(known)}; or key=value; or "
            "the directory of a task"
        )
    if STRATEGY_KEY in task.run_config:
        return {}, {STRATEGY_KEY: name}
    raise InvalidExperiment(
        f"{text!r} cannot be chosen: the app of the task {task.id!r} has no configuration `{STRATEGY_KEY}`. Use "
        "key=value for a key of its configuration, or the directory of another task"
    )


def _table_names() -> set[str]:
    fields = TaskTable.model_fields.items()
    return {(info.alias or name) for name, info in fields if hasattr(info.annotation, "model_fields")}


@dataclass(frozen=True)
class CompareExperiment:
    """The comparison of two variants."""

    seeds: Sequence[int]
    first: Variant
    second: Variant
    clients: int
    rounds: int
    partition: str
    data_dir: Path | None = None
    metric: str = "accuracy"
    common: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the run configuration of both sides."""
    profile: Mapping[str, Any] | None = None

    @property
    def variants(self) -> tuple[Variant, Variant]:
        return self.first, self.second

    @cached_property
    def names(self) -> tuple[str, str]:
        """The names of both sides, which differ."""
        first, second = self.first.name, self.second.name
        return (first, second) if first != second else (f"{first} (A)", f"{second} (B)")

    def plan(self, records: Sequence[CellRecord]) -> Sequence[Cell]:
        """Return two cells for each seed."""
        del records
        if self.metric not in METRICS:
            raise InvalidExperiment(f"unknown metric {self.metric!r}. Use one of {', '.join(METRICS)}")
        if VISION.resolve() in {one.task.resolve() for one in self.variants}:
            key = str(self.common.get("dataset", load_task(VISION).run_config["dataset"]))
            find_datasets([key], self.data_dir)
        return [self._cell(factors) for factors in grid(seed=self.seeds, side=["A", "B"])]

    def _cell(self, factors: Mapping[str, Any]) -> Cell:
        variant = self.variants["AB".index(factors["side"])]
        known = load_task(variant.task).run_config
        config = {key: value for key, value in self.common.items() if key in known}
        if "seed" in known:
            config["seed"] = factors["seed"]
        return training_cell(
            factors,
            task=variant.task,
            table=variant.table,
            config={**config, **variant.config},
            clients=self.clients,
            rounds=self.rounds,
            seed=factors["seed"],
            partition=self.partition,
            data_dir=self.data_dir,
            profile=self.profile,
        )

    # --- report -------------------------------------------------------------------------------

    def report(self, records: Sequence[CellRecord]) -> ExperimentReport:
        """Report means, differences and the verdict."""
        pairs = _pairs(records)
        a, b = self.names
        tasks = dict.fromkeys(load_task(one.task).id for one in self.variants)
        common = ", ".join(f"{key}={value}" for key, value in self.common.items())
        return ExperimentReport(
            title=f"{a} and {b}",
            setting=[
                f"task {' and '.join(tasks)}, {self.clients} clients, {self.rounds} rounds, partition {self.partition}"
                + (f", {common}" if common else ""),
                "both sides have the same seeds and partitions; 95 % intervals by Student's t, the difference by pairs",
            ],
            findings=[Finding(verdict(*_values(pairs, self.metric), names=self.names, metric=self.metric))],
            tables=[self._table(pairs)],
            plots=[
                Plot(
                    "compare.png",
                    f"{self.metric} by round",
                    lambda figure: self._draw(figure, records),
                    (8, 4.5),
                )
            ],
            rows=[
                {
                    "variant": self.names["AB".index(str(record.factors["side"]))],
                    **record.factors,
                    **{name: _or_none(final_value(record, name)) for name in METRICS},
                    "simulated_s": record.outcome["simulated_s"],
                }
                for record in records
            ],
        )

    def _table(self, pairs: Sequence[tuple[CellRecord, CellRecord]]) -> ReportTable:
        rows = []
        for name in METRICS:
            first, second = _values(pairs, name)
            if not first:
                continue
            show = _format_points if name.endswith("accuracy") else _format_number
            difference = estimate_difference(first, second)
            rows.append(
                [
                    name.replace("_", " "),
                    show(estimate_mean(first)),
                    show(estimate_mean(second)),
                    show(difference, signed=True),
                ]
            )
        a, b = self.names
        return ReportTable(
            f"After the last round, mean over {len(pairs)} seed{'' if len(pairs) == 1 else 's'}",
            ["metric", a, b, "difference"],
            rows,
            "± is half of the 95 % confidence interval. Accuracies in %, their differences in points.",
        )

    def _draw(self, figure: "Figure", records: Sequence[CellRecord]) -> None:
        """Draw the metric by round: the mean over the seeds, and the range of the seeds as a band."""
        axes = figure.subplots()
        for index, side in enumerate("AB"):
            curves = [
                dict(zip(*curve(record, self.metric), strict=True))
                for record in records
                if matches(record.factors, side=side)
            ]
            rounds = sorted(set.intersection(*(set(one) for one in curves))) if curves else []
            values = [[one[at] for one in curves] for at in rounds]
            color = COLORS[index]
            axes.plot(
                rounds,
                [sum(one) / len(one) for one in values],
                color=color,
                label=self.names[index],
                marker="o" if index == 0 else "s",
                markersize=4,
            )
            axes.fill_between(
                rounds,
                [min(one) for one in values],
                [max(one) for one in values],
                color=color,
                alpha=0.15,
                linewidth=0,
            )
        unit = f"{self.metric.replace('_', ' ')} on the test set"
        title = "line: mean over the seeds; band: lowest to highest" if len(self.seeds) > 1 else ""
        label_axes(axes, x="round", y=unit, title=title)
        axes.legend(loc="best")


def verdict(first: Sequence[float], second: Sequence[float], *, names: tuple[str, str], metric: str) -> str:
    """Return which side is better, or that no difference is shown, in one sentence."""
    a, b = names
    label = metric.replace("_", " ")
    if not first:
        return f"no verdict: the task reports no {label}"
    difference = estimate_difference(first, second)
    is_accuracy = metric.endswith("accuracy")
    show = _points if is_accuracy else _number
    if difference.count == 1:
        return (
            f"no verdict: {b} has {show(difference.mean)} in {label}, but one seed shows nothing about chance"
        )
    low = show(difference.low).removesuffix(" points")
    interval = f"95 % confidence interval {low} to {show(difference.high)}, {difference.count} seeds"
    if not difference.is_different_from_zero:
        return f"no difference is shown: {b} has {show(difference.mean)} in {label} against {a} ({interval})"
    is_better = (difference.mean > 0) == is_accuracy
    winner, loser = (b, a) if is_better else (a, b)
    size = show(abs(difference.mean)).lstrip("+")
    direction = "higher" if is_accuracy else "lower"
    return f"{winner} is better than {loser}: {label} {size} {direction} ({b} minus {a}: {interval})"


def _pairs(records: Sequence[CellRecord]) -> list[tuple[CellRecord, CellRecord]]:
    """Return the records of both sides of each seed; a seed with a failed cell has no pair."""
    by_seed: dict[Any, dict[str, CellRecord]] = {}
    for record in records:
        by_seed.setdefault(record.factors["seed"], {})[str(record.factors["side"])] = record
    return [(one["A"], one["B"]) for one in by_seed.values() if len(one) == 2]


def _values(pairs: Sequence[tuple[CellRecord, CellRecord]], name: str) -> tuple[list[float], list[float]]:
    """Return the final values of both sides; empty if a run lacks them."""
    values = [(final_value(a, name), final_value(b, name)) for a, b in pairs]
    if any(math.isnan(value) for pair in values for value in pair):
        return [], []
    return [a for a, _ in values], [b for _, b in values]


def _points(value: float) -> str:
    return f"{100 * value:+.2f} points"


def _number(value: float) -> str:
    return f"{value:+.4f}"


def _format_points(estimate: Estimate, *, signed: bool = False) -> str:
    return _with_interval(estimate, lambda value: f"{100 * value:{'+' if signed else ''}.2f}", 100)


def _format_number(estimate: Estimate, *, signed: bool = False) -> str:
    return _with_interval(estimate, lambda value: f"{value:{'+' if signed else ''}.4f}", 1)


def _with_interval(estimate: Estimate, show: Callable[[float], str], factor: float) -> str:
    if math.isnan(estimate.mean):
        return ABSENT
    text = show(estimate.mean)
    if estimate.count < 2:
        return text
    digits = 2 if factor == 100 else 4
    return f"{text} ± {factor * estimate.half_width:.{digits}f}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
