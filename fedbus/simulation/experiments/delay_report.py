"""The findings, tables and plots of the delay study."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from fedbus.simulation.experiments.cells import CellRecord, matches
from fedbus.simulation.experiments.plot_style import label_axes, style_of
from fedbus.simulation.experiments.report import ABSENT, Finding, ReportTable
from fedbus.simulation.experiments.training import curve, final_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT: Final = 1.3
"""The goal: at most this multiple of the time without delays."""
TOLERANCE: Final = 0.01
"""The accuracy is the same if it is lower by at most this."""


class DelayStudy:
    """The outcomes of the grid."""

    def __init__(
        self,
        records: Sequence[CellRecord],
        modes: Sequence[str],
        delays_s: Sequence[float],
        probabilities: Sequence[float],
    ) -> None:
        self.records = records
        self.modes = modes
        self.delays_s = delays_s
        self.probabilities = probabilities
        reference = self.of("sync", 0.0, 0.0)
        self.reference_accuracy = _mean(final_value(record, "accuracy") for record in reference)
        self.target = self.reference_accuracy - TOLERANCE
        self.reference_s = _mean(record.outcome["rounds"][-1]["at_s"] for record in reference)
        """The duration of the synchronous run without delays."""
        self.updates = max(
            (sum(one["updates"] for one in record.outcome["rounds"]) for record in reference), default=0
        )
        """The number of updates of that run."""

    def of(self, mode: str, delay_s: float, probability: float) -> list[CellRecord]:
        """Return the outcomes of all seeds. Without a delay, *delay_s* does not matter."""
        levels: dict[str, Any] = {"mode": mode, "probability": probability}
        if probability:
            levels["delay_s"] = delay_s
        return [record for record in self.records if matches(record.factors, **levels)]

    def time_to_target(self, record: CellRecord) -> float:
        """Return the time until the target accuracy, in seconds; NaN if the run does not reach it."""
        times, accuracies = curve(record, "accuracy", over="at_s")
        return next(
            (at for at, accuracy in zip(times, accuracies, strict=True) if accuracy >= self.target), math.nan
        )

    def mean_time(self, mode: str, delay_s: float, probability: float) -> float:
        """Return the mean time to the target over all seeds; NaN if one of them does not reach it."""
        return _mean(self.time_to_target(record) for record in self.of(mode, delay_s, probability))

    def mean_total(self, mode: str, delay_s: float, probability: float) -> float:
        """Return the mean duration of a run."""
        return _mean(record.outcome["rounds"][-1]["at_s"] for record in self.of(mode, delay_s, probability))

    # --- findings and tables ------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """Return whether the goals are met."""
        return [self._rise(), *(self._goal(mode) for mode in self.modes if mode != "sync")]

    def _rise(self) -> Finding:
        totals = [
            [self.mean_total("sync", delay_s, probability) for probability in self.probabilities]
            for delay_s in self.delays_s
        ]
        rises = all(low <= high * 1.001 for one in totals for low, high in pairwise(one))
        first, last = totals[-1][0], totals[-1][-1]
        return Finding(
            f"the synchronous run takes longer with each step of the probability: {first:.0f} s without delays, "
            f"{last:.0f} s if each training is delayed by {self.delays_s[-1]:g} s ({last / first:.2f} times)",
            is_met=rises,
        )

    def _goal(self, mode: str) -> Finding:
        ratios = {
            f"{delay_s:g} s × {probability:g}": self.mean_time(mode, delay_s, probability) / self.reference_s
            for delay_s in self.delays_s
            for probability in self.probabilities
            if probability or delay_s == self.delays_s[0]
        }
        missed = [
            f"{name}: {'not reached' if math.isnan(ratio) else f'{ratio:.2f}'}"
            for name, ratio in ratios.items()
            if not ratio <= LIMIT
        ]
        reaches = f"`{mode}` reaches the same accuracy"
        if missed:
            text = (
                f"{reaches} within {LIMIT:g} times the duration of the run without delays in "
                f"{len(ratios) - len(missed)} of {len(ratios)} cells; not in {', '.join(missed)}"
            )
        else:
            highest = max(ratios.values(), default=math.nan)
            text = f"{reaches} in at most {highest:.2f} times the duration of the run without delays (goal {LIMIT:g})"
        return Finding(text, is_met=not missed)

    def total_table(self) -> ReportTable:
        """Return the duration of the synchronous runs, the table of the paper."""
        rows = [
            [
                f"{delay_s:g} s",
                *(self._seconds("sync", delay_s, one, total=True) for one in self.probabilities),
            ]
            for delay_s in self.delays_s
        ]
        headings = ["delay", *(f"p = {one:g}" for one in self.probabilities)]
        return ReportTable("Duration of the synchronous run, in seconds", headings, rows)

    def time_table(self, delay_s: float) -> ReportTable:
        """Return the times of all modes with one delay."""
        rows = [
            [mode, *(self._seconds(mode, delay_s, one) for one in self.probabilities)] for mode in self.modes
        ]
        headings = ["mode", *(f"p = {one:g}" for one in self.probabilities)]
        note = (
            "In brackets: the multiple of the duration of the synchronous run without delays, "
            f"{_format(self.reference_s)} s."
        )
        return ReportTable(
            f"Time to the same accuracy with a delay of {delay_s:g} s, in seconds", headings, rows, note
        )

    def updates_table(self, delay_s: float) -> ReportTable:
        """Return the time until as many updates are aggregated as in the synchronous run, with the accuracy then."""
        rows = [
            [mode, *(self._progress(mode, delay_s, one) for one in self.probabilities)] for mode in self.modes
        ]
        headings = ["mode", *(f"p = {one:g}" for one in self.probabilities)]
        title = f"Time to {self.updates} updates with a delay of {delay_s:g} s, in seconds"
        note = "In brackets: the accuracy at this time, in %. An update is the aggregated result of one training."
        return ReportTable(title, headings, rows, note)

    def _progress(self, mode: str, delay_s: float, probability: float) -> str:
        reached = [self._at_updates(record) for record in self.of(mode, delay_s, probability)]
        values = [one for one in reached if one is not None]
        if not values or len(values) < len(reached):
            return ABSENT
        seconds, accuracy = fmean(one[0] for one in values), fmean(one[1] for one in values)
        return f"{seconds:.0f} ({100 * accuracy:.1f})"

    def _at_updates(self, record: CellRecord) -> tuple[float, float] | None:
        total = 0
        for one in record.outcome["rounds"]:
            total += one["updates"]
            if total >= self.updates and one["accuracy"] is not None:
                return one["at_s"], one["accuracy"]
        return None

    def _seconds(self, mode: str, delay_s: float, probability: float, *, total: bool = False) -> str:
        if total:
            return _format(self.mean_total(mode, delay_s, probability))
        seconds = self.mean_time(mode, delay_s, probability)
        return ABSENT if math.isnan(seconds) else f"{seconds:.0f} ({seconds / self.reference_s:.2f})"

    def row(self, record: CellRecord) -> dict[str, Any]:
        """Return the row of a cell in the CSV file."""
        to_target = self.time_to_target(record)
        return {
            **record.factors,
            "total_s": record.outcome["rounds"][-1]["at_s"],
            "time_to_accuracy_s": None if math.isnan(to_target) else to_target,
            "accuracy": final_value(record, "accuracy"),
            "loss": final_value(record, "loss"),
            "updates": sum(one["updates"] for one in record.outcome["rounds"]),
        }

    # --- plots --------------------------------------------------------------------------------

    def draw_times(self, figure: "Figure") -> None:
        """Draw the time to the same accuracy by probability, one panel for each delay."""
        panels = figure.subplots(1, len(self.delays_s), sharey=True, squeeze=False)[0]
        for axes, delay_s in zip(panels, self.delays_s, strict=True):
            for index, mode in enumerate(self.modes):
                times = [self.mean_time(mode, delay_s, one) for one in self.probabilities]
                axes.plot(self.probabilities, times, label=mode, **style_of(index))
            axes.axhline(LIMIT * self.reference_s, color="0.4", linestyle="--", linewidth=1)
            axes.annotate(
                f"{LIMIT:g} × the run without delays",
                (0, LIMIT * self.reference_s),
                xytext=(0, 4),
                textcoords="offset points",
                fontsize="small",
                color="0.3",
            )
            totals = [self.mean_total("sync", delay_s, one) for one in self.probabilities]
            axes.plot(self.probabilities, totals, color="0.5", linestyle=":", label="sync, whole run")
            label_axes(axes, x="probability of a delay", y="", title=f"delay {delay_s:g} s")
            axes.set_xticks(self.probabilities)
        panels[0].set_ylabel("time to the same accuracy (s)")
        top = max(LIMIT * self.reference_s, panels[0].get_ylim()[1])
        panels[0].set_ylim(0, 1.08 * top)
        panels[0].legend(loc="lower right")

    def draw_accuracy(self, figure: "Figure") -> None:
        """Draw the accuracy over time with the longest delay, for some probabilities."""
        chosen = [one for one in (0.2, 0.6, 1.0) if one in self.probabilities] or self.probabilities[-1:]
        panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
        delay_s = max(self.delays_s)
        for axes, probability in zip(panels, chosen, strict=True):
            for index, mode in enumerate(self.modes):
                for seed, record in enumerate(self.of(mode, delay_s, probability)):
                    label = mode if seed == 0 else None
                    axes.plot(
                        *curve(record, "accuracy", over="at_s"), label=label, alpha=0.8, **style_of(index)
                    )
            for seed, record in enumerate(self.of("sync", 0.0, 0.0)):
                label = "sync, no delay" if seed == 0 else None
                axes.plot(*curve(record, "accuracy", over="at_s"), color="0.5", linestyle=":", label=label)
            axes.axhline(self.target, color="0.4", linestyle="--", linewidth=1)
            label_axes(
                axes, x="time (s)", y="", title=f"delay {delay_s:g} s with probability {probability:g}"
            )
            axes.annotate(
                "same accuracy",
                (0, self.target),
                xytext=(0, 4),
                textcoords="offset points",
                fontsize="small",
                color="0.3",
            )
        panels[0].set_ylabel("accuracy on the test set")
        panels[0].set_ylim(0, 1.05)
        panels[-1].legend(loc="lower right")


def _mean(values: Any) -> float:
    numbers = list(values)
    return fmean(numbers) if numbers else math.nan


def _format(seconds: float) -> str:
    return ABSENT if math.isnan(seconds) else f"{seconds:.0f}"
