"""FLScalize's groups of unequal devices: the time of a round, of the training, and of the whole run.

Three groups of clients have a whole core, a half and a quarter of one. Each group trains on its own, and then all of
them together, where a synchronous round waits for the slowest group.

On this machine a cgroup limits the CPU time of each client while it trains, and the clock is real. Where that is not
permitted, a profile with the same factors makes the measured training times longer, and the clock is virtual.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from fedbus.simulation.experiments.cell_process import ReportProgress
from fedbus.simulation.experiments.cells import Cell, CellOutcome, CellRecord, matches
from fedbus.simulation.experiments.cpu_limits import LimitsUnavailable, assign_cores, find_parent, limit_cpu
from fedbus.simulation.experiments.datasets import find_datasets
from fedbus.simulation.experiments.experiment import grid
from fedbus.simulation.experiments.plot_style import grouped_bars, label_axes
from fedbus.simulation.experiments.report import ExperimentReport, Finding, Plot, ReportTable
from fedbus.simulation.experiments.training import final_value, simulate_cell, training_cell
from fedbus.simulation.settings import usable_cores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUNCTION: Final = f"{__name__}:simulate_limited"
GROUPS: Final = {"fast": 1.0, "medium": 0.5, "slow": 0.25}
"""The share of a core of each group's devices."""
TOGETHER: Final = "together"
CLIENTS: Final = 3
ROUNDS: Final = 5
BUSY_SHARE: Final = 0.5
"""The load of a core before a run above which other processes change its times."""
IMAGES: Final = 4000
QUICK_IMAGES: Final = 1000


def simulate_limited(settings: dict[str, Any], report_progress: ReportProgress) -> CellOutcome:
    """Simulate a run whose clients train within the CPU time of their groups."""
    load = os.getloadavg()[0]
    shares = {f"client-{number}": share for number, share in enumerate(settings["shares"])}
    with limit_cpu(shares) as groups:  # a group for each client: all processes of a group share its quota
        lists = ",".join(groups.process_lists.values())
        cores = assign_cores(settings["shares"], sorted(os.sched_getaffinity(0)))
        config = {
            **settings["config"],
            "cpu-groups": lists,
            "cpu-default": groups.default,
            "cpu-cores": ",".join(map(str, cores or ())),
        }
        outcome = simulate_cell({**settings, "config": config}, report_progress)
        return {
            **outcome,
            "cgroup_version": groups.version,
            "is_pinned": cores is not None,
            "load": round(load, 1),
            "cores": usable_cores(),
        }


@dataclass(frozen=True)
class DevicesExperiment:
    """Three groups of devices."""

    seeds: Sequence[int]
    data_dir: Path | None = None
    is_quick: bool = False
    use_profile: bool = False
    """Do not limit CPU time even where it is permitted."""

    @property
    def images(self) -> int:
        return QUICK_IMAGES if self.is_quick else IMAGES

    @cached_property
    def obstacle(self) -> str | None:
        """Why the CPU time is not limited; None if it is."""
        if self.use_profile:
            return "--profile was chosen"
        try:
            find_parent()
        except LimitsUnavailable as error:
            return str(error)
        return None

    def plan(self, records: Sequence[CellRecord]) -> Sequence[Cell]:
        """Return a cell for each group alone, and one for all together."""
        del records
        find_datasets(["mnist"], self.data_dir)
        return [self._cell(factors) for factors in grid(devices=[*GROUPS, TOGETHER], seed=self.seeds)]

    def _cell(self, factors: dict[str, Any]) -> Cell:
        group = factors["devices"]
        shares = GROUPS if group == TOGETHER else {group: GROUPS[group]}
        profile = None
        if self.obstacle is not None:
            names = [f"client-{number:04}" for number in range(CLIENTS)]
            profile = {
                "groups": {
                    name: {"clients": names[number :: len(shares)], "training": {"slowdown": 1 / share}}
                    for number, (name, share) in enumerate(shares.items())
                }
            }
        cell = training_cell(
            factors,
            table={} if profile else {"functions": "vision.limited"},
            config={"max-samples": self.images, "test-samples": 1000, "seed": factors["seed"]},
            clients=CLIENTS,
            rounds=ROUNDS,
            seed=factors["seed"],
            data_dir=self.data_dir,
            profile=profile,
            workers=1 if profile else CLIENTS,
            cost=1 / min(shares.values()),
        )
        if profile:
            return cell
        of_clients = [list(shares.values())[number % len(shares)] for number in range(CLIENTS)]
        return cell.model_copy(
            update={"function": FUNCTION, "settings": {**cell.settings, "shares": of_clients}}
        )

    # --- report -------------------------------------------------------------------------------

    def report(self, records: Sequence[CellRecord]) -> ExperimentReport:
        """Report the times."""
        times = {name: _Times(records, name) for name in (*GROUPS, TOGETHER)}
        times = {name: one for name, one in times.items() if one.records}
        if self.obstacle is None:
            version = records[0].outcome.get("cgroup_version", "")
            how = f"CPU time limited on this machine by cgroups (version {version}); the clock is real"
            how += _describe_cores(records) + _describe_load(records)
        else:
            how = (
                f"training times by profile, in virtual time, since CPU time is not limited: {self.obstacle}"
            )
        return ExperimentReport(
            title="Groups of unequal devices: time of rounds and of the training",
            setting=[
                f"{CLIENTS} clients, {self.images} images of MNIST each, the CNN of the quick start, {ROUNDS} rounds",
                how,
                "the first round is not in the mean times: in it, clients load code and data",
            ],
            findings=self._findings(times),
            tables=[self._table(times), _clients_table(times)],
            plots=[Plot("devices.png", "Time by group", lambda figure: _draw(figure, times), (8.0, 4.2))],
            rows=[
                {
                    **record.factors,
                    "round_s": fmean(_round_times(record)),
                    "train_s": fmean(_train_times(record)),
                    "total_s": record.outcome["rounds"][-1]["at_s"],
                    "accuracy": final_value(record, "accuracy"),
                }
                for record in records
            ],
        )

    def _table(self, times: "dict[str, _Times]") -> ReportTable:
        rows = [
            [
                name,
                " / ".join(f"{share:.0%}" for share in GROUPS.values())
                if name == TOGETHER
                else f"{GROUPS[name]:.0%}",
                f"{one.round_s:.2f}",
                f"{one.train_s:.2f}",
                f"{one.total_s:.1f}",
                f"{one.accuracy:.1%}",
            ]
            for name, one in times.items()
        ]
        headings = ["devices", "share of a core", "round (s)", "training (s)", "total (s)", "accuracy"]
        return ReportTable("Mean time of a round, of a client's training, and of the run", headings, rows)

    def _findings(self, times: "dict[str, _Times]") -> list[Finding]:
        if TOGETHER not in times or "slow" not in times or "fast" not in times:
            return []
        together, slow, fast = times[TOGETHER], times["slow"], times["fast"]
        findings = [
            Finding(
                f"together, a round takes {together.round_s:.2f} s: {together.round_s / fast.round_s:.1f} times that "
                f"of the fast devices, {together.round_s / slow.round_s:.2f} times that of the slow ones"
            )
        ]
        by_group = _times_by_group(times[TOGETHER].records)
        if by_group:
            waiting = 1 - by_group["fast"] / max(by_group.values())
            findings.append(
                Finding(f"a fast device trains in {1 - waiting:.0%} of the round and waits in the rest")
            )
        return findings


class _Times:
    """The mean times of one group of devices over all seeds."""

    def __init__(self, records: Sequence[CellRecord], devices: str) -> None:
        self.records = [record for record in records if matches(record.factors, devices=devices)]
        if not self.records:
            return
        self.round_s = fmean(one for record in self.records for one in _round_times(record))
        self.train_s = fmean(one for record in self.records for one in _train_times(record))
        self.total_s = fmean(record.outcome["rounds"][-1]["at_s"] for record in self.records)
        self.accuracy = fmean(final_value(record, "accuracy") for record in self.records)


def _describe_cores(records: Sequence[CellRecord]) -> str:
    """Describe which devices have a core of their own, and which do not get their share."""
    text = ". Each client trains on one core (CPU affinity), on which it has its share"
    unpinned = dict.fromkeys(
        str(one.factors["devices"]) for one in records if not one.outcome.get("is_pinned")
    )
    if unpinned:
        cores = min(record.outcome.get("cores", 1) for record in records)
        text += (
            f"; but not those of {', '.join(unpinned)}: together they need more than the {cores} cores, so they are "
            "slower than their share"
        )
    return text


def _describe_load(records: Sequence[CellRecord]) -> str:
    """Return a warning if other processes needed the cores too: they make all groups slower."""
    load = min(
        record.outcome.get("load", 0.0) for record in records
    )  # later cells see the load of earlier ones
    cores = min(record.outcome.get("cores", 1) for record in records)
    if load <= BUSY_SHARE * cores:
        return ""
    return f". The machine was busy (load {load:g} on {cores} cores), which changes these times: run it again later"


def _round_times(record: CellRecord) -> list[float]:
    """Return the duration of each round from the second on."""
    ends = [one["at_s"] for one in record.outcome["rounds"] if one["round"] >= 1]
    return [end - start for start, end in pairwise(ends)]


def _train_times(record: CellRecord) -> list[float]:
    rounds = [one for one in record.outcome["rounds"] if one["round"] > 1]
    return [seconds for one in rounds for seconds in one["train_s_by_client"].values()]


def _times_by_group(records: Sequence[CellRecord]) -> dict[str, float]:
    """Return the mean training time of each group where all train together."""
    names = list(GROUPS)
    values: dict[str, list[float]] = {}
    for record in records:
        for one in record.outcome["rounds"]:
            if one["round"] > 1:
                for client, seconds in one["train_s_by_client"].items():
                    number = int(client.rpartition("-")[2])
                    values.setdefault(names[number % len(names)], []).append(seconds)
    return {name: fmean(values[name]) for name in names if name in values}


def _clients_table(times: dict[str, _Times]) -> ReportTable:
    rows = []
    by_group = _times_by_group(times[TOGETHER].records) if TOGETHER in times else {}
    longest = max(by_group.values(), default=0.0)
    for name, seconds in by_group.items():
        rows.append([name, f"{GROUPS[name]:.0%}", f"{seconds:.2f}", f"{longest - seconds:.2f}"])
    headings = ["device", "share of a core", "training (s)", "waits for the slowest (s)"]
    return ReportTable("Together: the time of each device in a round", headings, rows)


def _draw(figure: "Figure", times: dict[str, _Times]) -> None:
    """Draw the time of a training and of a round for each group."""
    axes = figure.subplots()
    series = [
        ("training of a client", [one.train_s for one in times.values()], None),
        ("round", [one.round_s for one in times.values()], None),
    ]
    labels = [name if name == TOGETHER else f"{name}\n{GROUPS[name]:.0%} of a core" for name in times]
    grouped_bars(axes, labels, series, count=len(series))
    label_axes(axes, x="devices of the run", y="mean time (s)")
    axes.legend(loc="upper left")
