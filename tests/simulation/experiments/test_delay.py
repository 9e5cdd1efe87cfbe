"""The delay study: its grid, and what it concludes from the times of runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.data_files import write_mnist
from support.experiment_records import make_record, make_rounds, record_of

from fedbus.simulation.experiments.delay import DelayExperiment, aggregation_of, skip_first_round
from fedbus.simulation.experiments.delay_report import DelayStudy
from fedbus.simulation.experiments.errors import ExperimentDataMissing
from fedbus.simulation.experiments.report import ReportContext, write_report

ACCURACIES = (0.1, 0.5, 0.8, 0.9)
PROBABILITIES = (0.0, 0.5, 1.0)


def make_study(round_s: Callable[[str, float, float], float]) -> DelayStudy:
    """A study with one delay of 5 s, whose rounds take *round_s* of mode, delay and probability."""
    records = [
        make_record(
            make_rounds(ACCURACIES, round_s=round_s(mode, 5.0, probability)),
            mode=mode,
            delay_s=5.0,
            probability=probability,
            seed=1,
        )
        for mode in ("sync", "buffered")
        for probability in PROBABILITIES
    ]
    return DelayStudy(records, ("sync", "buffered"), (5.0,), PROBABILITIES, train_s=10.0)


def slow_sync(mode: str, delay_s: float, probability: float) -> float:
    return 10 + delay_s * probability * (1.0 if mode == "sync" else 0.4)


def test_the_goals_are_met() -> None:
    study = make_study(slow_sync)
    assert study.reference_accuracy == 0.9
    assert study.reference_s == 30
    assert study.mean_time("sync", 5.0, 1.0) == 45
    rise, goal, work = study.findings()
    assert rise.is_met
    assert "30 s without delays, 45 s if each training is delayed by 5 s (1.50 times)" in rise.text
    assert goal.is_met
    assert goal.text.startswith("`buffered` reaches the same accuracy in at most 1.20 times")
    assert goal.text.endswith("(goal 1.3; `sync`: 2 of 3 cells)")
    assert work.is_met is None


def test_missed_goals_are_named() -> None:
    study = make_study(lambda mode, delay_s, p: 10 + (delay_s * p if mode == "buffered" else -delay_s * p))
    rise, goal, _ = study.findings()
    assert rise.is_met is False
    assert goal.is_met is False
    assert goal.text.endswith("in 2 of 3 cells (`sync`: 3); not in 5 s × 1: 1.50")


def test_the_goal_is_relative_to_the_time_to_that_accuracy() -> None:
    """The run without delays reaches the target after 2 of 6 rounds: 20 s, not the 60 s of the whole run."""
    early = (0.1, 0.5, 0.895, 0.9, 0.9, 0.9, 0.9)
    records = [
        make_record(
            make_rounds(early, round_s=seconds), mode=mode, delay_s=5.0, probability=probability, seed=1
        )
        for mode, probability, seconds in (
            ("sync", 0.0, 10),
            ("sync", 1.0, 15),
            ("buffered", 0.0, 10),
            ("buffered", 1.0, 14),
        )
    ]
    study = DelayStudy(records, ("sync", "buffered"), (5.0,), (0.0, 1.0), train_s=10.0)
    assert (study.reference_s, study.reference_to_target_s) == (60, 20)
    assert study.time_table(5.0).rows == [
        ["sync", "20 (1.00)", "30 (1.50)"],
        ["buffered", "20 (1.00)", "28 (1.40)"],
    ]
    assert study.findings()[1].is_met is False


def test_an_accuracy_that_is_not_reached_is_no_time() -> None:
    study = make_study(slow_sync)
    short = make_record(make_rounds([0.1, 0.2]), mode="buffered", delay_s=5.0, probability=1.0, seed=1)
    study.records = [*study.records[:-1], short]
    assert "5 s × 1: not reached" in study.findings()[1].text
    assert study.time_table(5.0).rows[1][-1] == "–"
    assert study.row(study.records[-1])["time_to_accuracy_s"] is None


def test_equal_work_is_compared_too() -> None:
    study = make_study(slow_sync)
    assert study.updates == 9
    assert study.updates_table(5.0).rows == [
        ["sync", "30 (1.00) 90.0%", "38 (1.25) 90.0%", "45 (1.50) 90.0%"],
        ["buffered", "30 (1.00) 90.0%", "33 (1.10) 90.0%", "36 (1.20) 90.0%"],
        ["no client waits", "30 (1.00)", "38 (1.25)", "45 (1.50)"],
    ]


def test_the_physical_limit_is_named() -> None:
    text = make_study(slow_sync).findings()[-1].text
    assert text.startswith(
        "equal work, 9 updates, in at most 1.3 times the time of the run without delays: `sync` 2, `buffered` 3 of 3"
    )
    assert (
        "cells. No mode can have more than 2: with probability 1 and 5 s an update takes its client 15.0 s"
        in text
    )
    assert text.endswith("so 3 clients that never wait need 45 s (1.50 times)")


def test_real_times_begin_after_the_first_round() -> None:
    record = make_record(make_rounds([0.1, 0.2, 0.3], round_s=10))
    rounds = skip_first_round(record).outcome["rounds"]
    assert [(one["round"], one["at_s"]) for one in rounds] == [(1, 0), (2, 10)]


def test_tables_have_seconds_and_multiples() -> None:
    study = make_study(slow_sync)
    assert study.total_table().rows == [["5 s", "30", "38", "45"]]
    assert study.time_table(5.0).rows == [
        ["sync", "30 (1.00)", "38 (1.25)", "45 (1.50)"],
        ["buffered", "30 (1.00)", "33 (1.10)", "36 (1.20)"],
    ]


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDBUS_HOME", str(tmp_path / "home"))
    write_mnist(tmp_path / "data/mnist", [0, 1, 2], size=28)
    return tmp_path / "data"


def test_the_grid_follows_the_calibration(data_dir: Path) -> None:
    experiment = DelayExperiment([1, 2], data_dir, is_quick=True)
    [calibration] = experiment.plan([])
    measured = record_of(calibration, make_rounds([0.1, 0.2, 0.3], train_s=(0.125, 0.125, 0.125)))
    cells = experiment.plan([measured])
    assert cells[0] == calibration
    assert len(cells) - 1 == 3 * (1 + 3 * 5) * 2  # three modes, one cell without delays, two seeds
    cell = next(one for one in cells if one.name == "mode=deadline,delay_s=4,probability=0.6,seed=2")
    client = cell.settings["profile"]["groups"]["client"]
    assert client["delay"] == {"seconds": 4.0, "probability": 0.6}
    assert client["training"]["seconds"]["mean-s"] == 10.0  # 0.125 s for 625 images, as for 50,000
    assert cell.settings["table"] == {"aggregation": {"mode": "deadline", "deadline-s": 12.0}}
    assert experiment.plan([measured]) == cells


def test_real_clients_sleep_without_a_profile(data_dir: Path) -> None:
    experiment = DelayExperiment([1], data_dir, is_real=True)
    [calibration] = experiment.plan([])
    measured = record_of(calibration, make_rounds([0.1, 0.2, 0.3], train_s=(4, 4, 4)))
    cell = next(one for one in experiment.plan([measured]) if "delay_s=5,probability=1" in one.name)
    assert cell.settings["profile"] is None
    assert cell.settings["workers"] == 3
    assert cell.settings["config"]["delay-s"] == 5.0
    assert cell.settings["config"]["delay-probability"] == 1.0


def test_the_report_is_written(data_dir: Path, tmp_path: Path) -> None:
    experiment = DelayExperiment([1], data_dir, probabilities=(0.0, 1.0), delays_s=(3.0,))
    [calibration] = experiment.plan([])
    measured = record_of(calibration, make_rounds([0.1, 0.2, 0.3], train_s=(0.5, 0.5, 0.5)))
    records = [
        measured,
        *(record_of(one, make_rounds(ACCURACIES)) for one in experiment.plan([measured])[1:]),
    ]
    report = experiment.report(records)
    write_report(report, records, ReportContext("fedbus", [1], 1), tmp_path)
    assert (tmp_path / "time.png").exists()
    page = (tmp_path / "README.md").read_text()
    assert "on MNIST, since CIFAR-10 is not in the data folder" in page
    assert "A training on 1250 images took 0.50 s of CPU time on this machine" in page


def test_data_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExperimentDataMissing, match="needs the data of CIFAR-10 or MNIST: the data folder"):
        DelayExperiment([1], tmp_path / "nothing").plan([])


@pytest.mark.parametrize(
    ("mode", "table"),
    [
        ("sync", {}),
        ("deadline", {"mode": "deadline", "deadline-s": 12.0}),
        ("buffered", {"mode": "buffered", "buffer-size": 2}),
    ],
)
def test_the_modes_have_their_tables(mode: str, table: dict[str, Any]) -> None:
    assert aggregation_of(mode, 10.0) == table
