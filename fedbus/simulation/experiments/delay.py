"""The delay study of Choi et al.: a delay after each training with a probability, and how long a run takes.

One server and three clients train the CNN of the quick start. After each training, a client waits *delay* seconds
with *probability*. The same grid with the aggregation modes ``deadline`` and ``buffered`` shows what they win back.

By default the clock is virtual. The training times are measured first, without delays, and every cell uses them; so a
busy machine does not change a result. With *real*, clients sleep and the clock is real.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Final

from fedbus.simulation.experiments.cells import Cell, CellRecord
from fedbus.simulation.experiments.datasets import BenchmarkDataset, find_datasets
from fedbus.simulation.experiments.delay_report import CLIENTS, LIMIT, TOLERANCE, DelayStudy
from fedbus.simulation.experiments.experiment import grid
from fedbus.simulation.experiments.report import (
    ExperimentReport,
    Plot,
)
from fedbus.simulation.experiments.training import training_cell

DELAYS_S: Final = (3.0, 4.0, 5.0)
PROBABILITIES: Final = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MODES: Final = ("sync", "deadline", "buffered")
DEADLINE_FACTOR: Final = 1.2
"""The deadline of a round, in training times: above the spread of trainings without a delay, below all with one."""
BUFFER_SIZE: Final = 2
"""With 1, the accuracy jumps by many points from one aggregation to the next; with 3, it rises more slowly."""
QUICK_START_IMAGES: Final = 50_000
"""In the quick start, each client trains on the whole training set of CIFAR-10 in each round."""


@dataclass(frozen=True)
class DelayScale:
    """The size of the experiment."""

    images: int
    """The images that each client trains on in a round."""
    rounds: int
    test_images: int


FULL: Final = DelayScale(images=1250, rounds=10, test_images=2000)
QUICK: Final = DelayScale(images=625, rounds=8, test_images=1000)
LEARNING_RATE: Final = 0.03
CALIBRATION_ROUNDS: Final = 4


@dataclass(frozen=True)
class DelayExperiment:
    """The delay study."""

    seeds: Sequence[int]
    data_dir: Path | None = None
    is_quick: bool = False
    is_real: bool = False
    modes: Sequence[str] = MODES
    delays_s: Sequence[float] = DELAYS_S
    probabilities: Sequence[float] = PROBABILITIES

    @property
    def scale(self) -> DelayScale:
        return QUICK if self.is_quick else FULL

    @property
    def images(self) -> int:
        """The images that each client trains on."""
        if self.is_real and not self.is_quick:
            return QUICK_START_IMAGES // CLIENTS
        return self.scale.images

    @property
    def dataset(self) -> BenchmarkDataset:
        """CIFAR-10 if it is there, else MNIST."""
        return find_datasets(("cifar-10", "mnist"), self.data_dir).present[0]

    def plan(self, records: Sequence[CellRecord]) -> Sequence[Cell]:
        """Return the calibration, and with its result the grid."""
        calibration = self._calibration()
        measured = [record for record in records if record.digest == calibration.digest]
        if not measured:
            return [calibration]
        times = training_times(measured[0], is_real=self.is_real)
        return [calibration, *(self._cell(factors, times) for factors in self._grid())]

    def _grid(self) -> list[dict[str, Any]]:
        """Return the levels of all cells. Without a delay there is one cell for each mode and seed."""
        rows = grid(mode=self.modes, delay_s=self.delays_s, probability=self.probabilities, seed=self.seeds)
        return [row for row in rows if row["probability"] or row["delay_s"] == self.delays_s[0]]

    def _calibration(self) -> Cell:
        return training_cell(
            {"mode": "sync", "calibration": "training times"},
            config=self._config(),
            clients=CLIENTS,
            rounds=CALIBRATION_ROUNDS,
            seed=self.seeds[0],
            data_dir=self.data_dir,
            workers=self._workers,
        )

    def _cell(self, factors: Mapping[str, Any], times: Sequence[float]) -> Cell:
        train_s = fmean(times) * self.slowdown
        mode, rounds = factors["mode"], self.scale.rounds
        if mode != "sync":  # an aggregation may have fewer updates than a round of all clients
            rounds = math.ceil(rounds * CLIENTS / BUFFER_SIZE)
        chance = {"seconds": factors["delay_s"], "probability": factors["probability"]}
        config, profile = self._config(), None
        if self.is_real:
            config |= {"delay-s": chance["seconds"], "delay-probability": chance["probability"]}
        else:
            duration = {
                "distribution": "normal",
                "mean-s": round(train_s, 4),
                "std-s": round(pstdev(times) * self.slowdown, 4),
                "min-s": round(min(times) * self.slowdown, 4),
            }
            profile = {
                "description": "delay study",
                "groups": {"client": {"training": {"seconds": duration}, "delay": chance}},
            }
        return training_cell(
            factors,
            table={"aggregation": aggregation_of(mode, train_s)},
            config=config,
            clients=CLIENTS,
            rounds=rounds,
            seed=factors["seed"],
            data_dir=self.data_dir,
            profile=profile,
            workers=self._workers,
        )

    @property
    def _workers(self) -> int:
        """The clients of a real run train and sleep at the same time."""
        return CLIENTS if self.is_real else 1

    @property
    def slowdown(self) -> float:
        """How much longer a training takes than the measured one: as long as on all images of the quick start."""
        return 1.0 if self.is_real else QUICK_START_IMAGES / self.scale.images

    def _config(self) -> dict[str, Any]:
        scale = self.scale
        return {
            "dataset": self.dataset.key,
            "max-samples": self.images,
            "test-samples": scale.test_images,
            "lr": LEARNING_RATE,
            "seed": self.seeds[0],
        }

    # --- report -------------------------------------------------------------------------------

    def report(self, records: Sequence[CellRecord]) -> ExperimentReport:
        """Report the times of all modes."""
        measured = [record for record in records if "calibration" in record.factors]
        cells = [record for record in records if "calibration" not in record.factors]
        if self.is_real:
            cells = [skip_first_round(record) for record in cells]
        times = training_times(measured[0], is_real=self.is_real) if measured else [math.nan]
        study = DelayStudy(
            cells, self.modes, self.delays_s, self.probabilities, train_s=fmean(times) * self.slowdown
        )
        return ExperimentReport(
            title="Delay study: training time under delays, and what aggregation modes win back",
            setting=self._setting(times, study),
            findings=[*study.findings()],
            tables=[
                study.total_table(),
                *(study.time_table(delay_s) for delay_s in self.delays_s),
                *(study.updates_table(delay_s) for delay_s in self.delays_s),
            ],
            plots=[
                Plot("time.png", "Time by probability", study.draw_times, (10.5, 4.2)),
                Plot("accuracy.png", "Accuracy over time", study.draw_accuracy, (10.5, 4.2)),
            ],
            rows=[study.row(record) for record in cells],
        )

    def _setting(self, times: Sequence[float], study: DelayStudy) -> list[str]:
        clock = (
            (
                "the clock is real: the clients are processes of this machine that train and sleep; there is no "
                f"network. A training on {self.images} images took {fmean(times):.1f} s"
            )
            if self.is_real
            else (
                f"the clock is virtual. A training on {self.scale.images} images took {fmean(times):.2f} s of CPU "
                f"time on this machine; it counts {self.slowdown:g} times, as long as one on the "
                f"{QUICK_START_IMAGES} images of the quick start: {fmean(times) * self.slowdown:.1f} s"
            )
        )
        network = "conv 3-6-5, pool, conv 6-16-5, 120-84-10"
        absent = "" if self.dataset.key == "cifar-10" else ", since CIFAR-10 is not in the data folder"
        modes = (
            f"{self.scale.rounds} rounds with learning rate {LEARNING_RATE}; deadline: {DEADLINE_FACTOR:g} training "
            f"times, late updates are merged; buffered: aggregation after {BUFFER_SIZE} updates; "
            f"{math.ceil(self.scale.rounds * CLIENTS / BUFFER_SIZE)} aggregations in both, which have fewer updates"
        )
        accuracy = (
            f"the goal is the same final accuracy in at most {LIMIT:g} times the time without delays. The accuracy is "
            f"the final one of the synchronous run without delays ({study.reference_accuracy:.1%}) less "
            f"{TOLERANCE * 100:g} point; its time without delays is that of the same run to this accuracy"
        )
        return [
            f"1 server, {CLIENTS} clients, the CNN of the quick start ({network}) on {self.dataset.title}{absent}",
            clock,
            modes,
            accuracy,
        ]


def aggregation_of(mode: str, train_s: float) -> dict[str, Any]:
    """Return ``[tool.fedbus.aggregation]`` for *mode*; *train_s* is the time of a training."""
    match mode:
        case "deadline":
            return {"mode": mode, "deadline-s": round(train_s * DEADLINE_FACTOR, 3)}
        case "buffered":
            return {"mode": mode, "buffer-size": BUFFER_SIZE}
        case _:
            return {}


def training_times(record: CellRecord, *, is_real: bool = False) -> list[float]:
    """Return the CPU times of all trainings, of real clients the durations.

    The first round is left out, since clients load data and code in it.
    """
    name = "train_s_by_client" if is_real else "cpu_s_by_client"
    rounds = [one for one in record.outcome["rounds"] if one["round"] > 1]
    return [seconds for one in rounds for seconds in one[name].values()]


def skip_first_round(record: CellRecord) -> CellRecord:
    """Return *record* with times from the end of the first round on: in real time, clients load code and data in it."""
    rounds = [one for one in record.outcome["rounds"] if one["round"] >= 1]
    start = rounds[0]["at_s"]
    shifted = [{**one, "at_s": one["at_s"] - start} for one in rounds]
    return record.model_copy(update={"outcome": {**record.outcome, "rounds": shifted}})
