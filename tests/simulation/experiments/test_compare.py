"""Comparisons: the two sides, and the verdict."""

from pathlib import Path

import pytest
from support.experiment_records import make_rounds, record_of

from fedbus.simulation.experiments.compare import CompareExperiment, Variant, parse_variant, verdict
from fedbus.simulation.experiments.errors import InvalidExperiment
from fedbus.simulation.experiments.report import ReportContext, write_report
from fedbus.simulation.experiments.training import VISION

FLOWER_TASK = Path(__file__).parents[2] / "support/tiny_task"


def test_a_side_is_a_strategy_a_mode_settings_or_a_task() -> None:
    assert parse_variant("FedProx", VISION).table == {"aggregation": {"strategy": "fedprox"}}
    assert parse_variant("buffered", VISION).table == {"aggregation": {"mode": "buffered"}}
    assert parse_variant("scaffold", VISION).table == {"functions": "vision.scaffold"}
    settings = parse_variant("lr=0.1,model=mlp,aggregation.eta=0.5,aggregation.strategy=fedadam", VISION)
    assert settings.config == {"lr": 0.1, "model": "mlp"}
    assert settings.table == {"aggregation": {"eta": 0.5, "strategy": "fedadam"}}
    assert parse_variant(str(FLOWER_TASK), VISION) == Variant("tiny_task", FLOWER_TASK)


@pytest.mark.parametrize(
    ("text", "task", "message"),
    [
        ("fedfoo", VISION, "'fedfoo' is no strategy, mode or directory of a task. Use one of fedavg"),
        ("rate=1", VISION, "no key `rate`: known keys: batch-size, .*aggregation.strategy=fedadam$"),
        ("batchsize=1", VISION, r"no key `batchsize`: did you mean `batch-size`\?"),
        ("batch-size=1.5", VISION, "`batch-size` = 1.5: use an integer; the task has "),
        ("lr=nan", VISION, "`lr` = nan: use a finite number; the task has "),
        ("lr=1,,", VISION, "'' is not key=value"),
        ("fedprox", FLOWER_TASK, "has no configuration `strategy`"),
    ],
)
def test_other_sides_are_errors(text: str, task: Path, message: str) -> None:
    with pytest.raises(InvalidExperiment, match=message):
        parse_variant(text, task)


NAMES = ("fedavg", "fedprox")


def test_the_verdict_names_the_better_side() -> None:
    better = verdict([0.90, 0.91, 0.92], [0.92, 0.93, 0.945], names=NAMES, metric="accuracy")
    assert better.startswith(
        "fedprox is better than fedavg: accuracy 2.17 points higher (fedprox minus fedavg:"
    )
    worse = verdict([0.5, 0.6], [0.7, 0.8], names=NAMES, metric="loss")
    assert worse.startswith("fedavg is better than fedprox: loss 0.2000 lower")


def test_there_may_be_no_verdict() -> None:
    none = verdict([0.9, 0.91, 0.95], [0.91, 0.90, 0.96], names=NAMES, metric="accuracy")
    assert none.startswith(
        "no difference is shown: fedprox has +0.33 points in accuracy against fedavg (95 %"
    )
    assert "one seed shows nothing about chance" in verdict([0.9], [0.8], names=NAMES, metric="accuracy")
    assert verdict([], [], names=NAMES, metric="accuracy") == "no verdict: the task reports no accuracy"


def make_experiment(seeds: list[int]) -> CompareExperiment:
    return CompareExperiment(
        seeds,
        Variant("fedavg", FLOWER_TASK),
        Variant("fedavg", FLOWER_TASK),
        clients=2,
        rounds=1,
        partition="iid",
    )


def test_both_sides_have_the_same_seeds_and_partitions() -> None:
    cells = make_experiment([1, 2]).plan([])
    assert [cell.name for cell in cells] == [
        "seed=1,side=A",
        "seed=1,side=B",
        "seed=2,side=A",
        "seed=2,side=B",
    ]
    assert cells[0].settings == cells[1].settings
    assert cells[0].settings["seed"] != cells[2].settings["seed"]


def test_an_unknown_metric_is_an_error() -> None:
    experiment = CompareExperiment(
        [1], Variant("a", FLOWER_TASK), Variant("b", FLOWER_TASK), 2, 1, "iid", metric="speed"
    )
    with pytest.raises(InvalidExperiment, match="unknown metric 'speed'"):
        experiment.plan([])


def test_the_report_leaves_out_seeds_without_a_pair(tmp_path: Path) -> None:
    experiment = make_experiment([1, 2, 3])
    records = [
        record_of(cell, make_rounds([0.1, 0.5 + 0.1 * number]))
        for number, cell in enumerate(experiment.plan([]))
    ][:5]
    report = experiment.report(records)
    assert report.tables[0].title == "After the last round, mean over 2 seeds"
    assert report.tables[0].headings == ["metric", "fedavg (A)", "fedavg (B)", "difference"]
    assert report.tables[0].rows[0][3] == "+10.00 ± 0.00"
    write_report(report, records, ReportContext("fedbus", [1, 2, 3], 1), tmp_path)
    assert (tmp_path / "compare.png").exists()
