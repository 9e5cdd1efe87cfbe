"""The findings, tables and plots of the delay study.

Two ratios to the synchronous run without delays, of the same seeds:

- time to the same accuracy: this run's time to the target, divided by that run's own time to it. This is the goal;
- equal work: the time for as many updates as that run has. No mode can be faster than its clients, which need the time
  of a training and the mean delay for each update.
"""

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

CLIENTS: Final = 3
LIMIT: Final = 1.3
"""The goal: the same accuracy in at most this multiple of the time without delays."""
MAX_NAMED: Final = 4
"""If more cells miss the goal, only the tables name them."""
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
        *,
        train_s: float = math.nan,
    ) -> None:
        self.records = records
        self.modes = modes
        self.delays_s = delays_s
        self.probabilities = probabilities
        reference = self.of("sync", 0.0, 0.0)
        self.reference_accuracy = _mean(final_value(record, "accuracy") for record in reference)
        self.target = self.reference_accuracy - TOLERANCE
        self.train_s = train_s
        """The mean time of a training without delays."""
        self.reference_s = _mean(record.outcome["rounds"][-1]["at_s"] for record in reference)
        """The duration of the synchronous run without delays."""
        self.reference_to_target_s = self.mean_time("sync", 0.0, 0.0)
        """The time of that run to the target."""
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

    def mean_at_updates(self, mode: str, delay_s: float, probability: float) -> tuple[float, float]:
        """Return the mean time until as many updates are aggregated as in the reference, and the mean accuracy then.

        NaN if a run has fewer updates.
        """
        reached = [self._at_updates(record) for record in self.of(mode, delay_s, probability)]
        return _mean(seconds for seconds, _ in reached), _mean(accuracy for _, accuracy in reached)

    def _at_updates(self, record: CellRecord) -> tuple[float, float]:
        total = 0
        for one in record.outcome["rounds"]:
            total += one["updates"]
            if total >= self.updates and one["accuracy"] is not None:
                return one["at_s"], one["accuracy"]
        return math.nan, math.nan

    def limit_s(self, delay_s: float, probability: float) -> float:
        """Return the time for equal work if no client ever waits for another one."""
        return self.updates / CLIENTS * (self.train_s + probability * delay_s)

    @property
    def levels(self) -> list[tuple[float, float]]:
        """Delay and probability of all columns; without a delay there is one."""
        return [
            (delay_s, probability)
            for delay_s in self.delays_s
            for probability in self.probabilities
            if probability or delay_s == self.delays_s[0]
        ]

    # --- findings and tables ------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """Return whether the goals are met, and what limits them."""
        others = [mode for mode in self.modes if mode != "sync"]
        return [self._rise(), *(self._goal(mode) for mode in others), self._equal_work()]

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
        ratios = self._target_ratios(mode)
        missed = [
            f"{name}: {'not reached' if math.isnan(ratio) else f'{ratio:.2f}'}"
            for name, ratio in ratios.items()
            if not ratio <= LIMIT
        ]
        reaches = f"`{mode}` reaches the same accuracy"
        if missed:
            text = (
                f"{reaches} in at most {LIMIT:g} times the time that the synchronous run without delays needs for it "
                f"in {len(ratios) - len(missed)} of {len(ratios)} cells (`sync`: {self._count_met('sync')})"
            )
            if len(missed) <= MAX_NAMED:  # the tables have all
                text += f"; not in {', '.join(missed)}"
        else:
            highest = max(ratios.values(), default=math.nan)
            text = (
                f"{reaches} in at most {highest:.2f} times the time that the synchronous run without delays needs for "
                f"it (goal {LIMIT:g}; `sync`: {self._count_met('sync')} of {len(ratios)} cells)"
            )
        return Finding(text, is_met=not missed)

    def _target_ratios(self, mode: str) -> dict[str, float]:
        return {
            f"{delay_s:g} s × {probability:g}": self.mean_time(mode, delay_s, probability)
            / self.reference_to_target_s
            for delay_s, probability in self.levels
        }

    def _count_met(self, mode: str) -> int:
        return sum(ratio <= LIMIT for ratio in self._target_ratios(mode).values())

    def _equal_work(self) -> Finding:
        counts = [
            f"`{mode}` {sum(self._work_ratio(mode, *level) <= LIMIT for level in self.levels)}"
            for mode in self.modes
        ]
        possible = sum(self.limit_s(*level) <= LIMIT * self.reference_s for level in self.levels)
        longest, last = max(self.delays_s), self.probabilities[-1]
        limit_s = self.limit_s(longest, last)
        return Finding(
            f"equal work, {self.updates} updates, in at most {LIMIT:g} times the time of the run without delays: "
            f"{', '.join(counts)} of {len(self.levels)} cells. No mode can have more than {possible}: with probability "
            f"{last:g} and {longest:g} s an update takes its client {self.train_s + last * longest:.1f} s instead of "
            f"{self.train_s:.1f} s, so {CLIENTS} clients that never wait need {limit_s:.0f} s "
            f"({limit_s / self.reference_s:.2f} times)"
        )

    def _work_ratio(self, mode: str, delay_s: float, probability: float) -> float:
        return self.mean_at_updates(mode, delay_s, probability)[0] / self.reference_s

    def total_table(self) -> ReportTable:
        """Return the duration of the synchronous runs, the table of the paper."""
        rows = [
            [
                f"{delay_s:g} s",
                *(_format(self.mean_total("sync", delay_s, one)) for one in self.probabilities),
            ]
            for delay_s in self.delays_s
        ]
        return ReportTable("Duration of the synchronous run, in seconds", self._headings("delay"), rows)

    def time_table(self, delay_s: float) -> ReportTable:
        """Return the times to the target of all modes with one delay."""
        rows = [
            [
                mode,
                *(
                    _with_ratio(self.mean_time(mode, delay_s, one), self.reference_to_target_s)
                    for one in self.probabilities
                ),
            ]
            for mode in self.modes
        ]
        note = (
            "In brackets: the multiple of the time that the synchronous run without delays needs for this accuracy, "
            f"{_format(self.reference_to_target_s)} s. The goal is at most {LIMIT:g}."
        )
        title = f"Time to the same accuracy with a delay of {delay_s:g} s, in seconds"
        return ReportTable(title, self._headings("mode"), rows, note)

    def updates_table(self, delay_s: float) -> ReportTable:
        """Return the time until as many updates are aggregated as in the synchronous run, with the accuracy then."""
        rows = [
            [mode, *(self._progress(mode, delay_s, one) for one in self.probabilities)] for mode in self.modes
        ]
        rows.append(
            [
                "no client waits",
                *(_with_ratio(self.limit_s(delay_s, one), self.reference_s) for one in self.probabilities),
            ]
        )
        title = f"Equal work: time to {self.updates} updates with a delay of {delay_s:g} s, in seconds"
        note = (
            "In brackets: the multiple of the duration of the synchronous run without delays, "
            f"{_format(self.reference_s)} s; then the accuracy at this time. An update is the aggregated result of one "
            "training. The last row is the limit of all modes: each client trains again as soon as its delay is over."
        )
        return ReportTable(title, self._headings("mode"), rows, note)

    def _headings(self, first: str) -> list[str]:
        return [first, *(f"p = {one:g}" for one in self.probabilities)]

    def _progress(self, mode: str, delay_s: float, probability: float) -> str:
        seconds, accuracy = self.mean_at_updates(mode, delay_s, probability)
        if math.isnan(seconds):
            return ABSENT
        return f"{_with_ratio(seconds, self.reference_s)} {100 * accuracy:.1f}%"

    def row(self, record: CellRecord) -> dict[str, Any]:
        """Return the row of a cell in the CSV file."""
        to_target, (at_updates, _) = self.time_to_target(record), self._at_updates(record)
        return {
            **record.factors,
            "total_s": record.outcome["rounds"][-1]["at_s"],
            "time_to_accuracy_s": None if math.isnan(to_target) else to_target,
            "time_to_equal_work_s": None if math.isnan(at_updates) else at_updates,
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
            axes.axhline(
                LIMIT * self.reference_to_target_s,
                color="0.4",
                linestyle="--",
                linewidth=1,
                label=f"{LIMIT:g} × sync without delays",
            )
            label_axes(axes, x="probability of a delay", y="", title=f"delay {delay_s:g} s")
            axes.set_xticks(self.probabilities)
        panels[0].set_ylabel("time to the same accuracy (s)")
        top = max(LIMIT * self.reference_to_target_s, panels[0].get_ylim()[1])
        panels[0].set_ylim(0, 1.08 * top)
        panels[0].legend(loc="lower right", fontsize="small")

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


def _with_ratio(seconds: float, reference_s: float) -> str:
    return ABSENT if math.isnan(seconds) else f"{seconds:.0f} ({seconds / reference_s:.2f})"


def _format(seconds: float) -> str:
    return ABSENT if math.isnan(seconds) else f"{seconds:.0f}"
