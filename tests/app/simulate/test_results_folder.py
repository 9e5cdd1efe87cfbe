"""The results folder of a simulation: what a killed one leaves is enough to continue."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.app.failures import CliError
from fedbus.app.simulate.results_folder import (
    CHECKPOINTS,
    ROUNDS_FILE,
    ResultsFolder,
    SimulationConfig,
    SimulationRecord,
    latest_results_path,
    new_results_path,
)
from fedbus.contracts.run import RoundResult
from fedbus.learning import weights
from fedbus.learning.weights import Arrays

CONFIG = SimulationConfig(task="tiny", code_version="v1", clients=10, rounds=3, seed=0)


def model(value: float) -> Arrays:
    return {"w": np.full(3, value, np.float32)}


def folder(path: Path) -> ResultsFolder:
    record = SimulationRecord(simulation=path.name, config=CONFIG, fedbus="1.0", started=datetime.now(UTC))
    return ResultsFolder.create(path, record)


def with_rounds(path: Path, count: int) -> ResultsFolder:
    results = folder(path)
    for number in range(1, count + 1):
        results.add_round(RoundResult(round=number, metrics={"loss": 1 / number}), model(number))
    return results


def test_a_simulation_continues_after_its_last_complete_round(tmp_path: Path) -> None:
    with_rounds(tmp_path / "sim", 2)
    done, arrays = ResultsFolder.open(tmp_path / "sim").read_checkpoint()

    assert (done, arrays["w"].tolist()) == (2, [2, 2, 2])


def test_a_partial_last_line_is_no_round(tmp_path: Path) -> None:
    results = with_rounds(tmp_path / "sim", 2)
    with (results.path / ROUNDS_FILE).open("a") as file:
        file.write('{"round": 3, "metr')

    assert results.read_checkpoint()[0] == 2


def test_rounds_after_a_partial_line_are_read(tmp_path: Path) -> None:
    results = with_rounds(tmp_path / "sim", 2)
    with (results.path / ROUNDS_FILE).open("a") as file:
        file.write('{"round": 3, "metr')
    results.begin(CONFIG, trace_parent="")
    results.add_round(RoundResult(round=3), model(3))
    results.end("finished", seconds=1.0)

    assert [one.round for one in results.read_rounds()] == [1, 2, 3]


def test_of_a_repeated_round_the_last_result_counts(tmp_path: Path) -> None:
    results = with_rounds(tmp_path / "sim", 2)
    results.add_round(RoundResult(round=2, metrics={"loss": 9.0}), model(9))

    assert [one.loss for one in results.read_rounds()] == [1.0, 9.0]


def test_a_diverged_simulation_keeps_its_rounds(tmp_path: Path) -> None:
    results = folder(tmp_path / "sim")
    result = RoundResult(round=1, metrics={"loss": math.inf}, figures={"c1": {"train_loss": math.nan}})
    results.add_round(result, model(1))

    (read,) = results.read_rounds()
    assert read.loss == math.inf
    assert math.isnan(read.figures["c1"]["train_loss"])


def test_a_running_simulation_is_not_continued_by_another(tmp_path: Path) -> None:
    results = with_rounds(tmp_path / "sim", 1)
    results.begin(CONFIG, trace_parent="")
    other = ResultsFolder.open(results.path)

    with pytest.raises(CliError, match="is already running"):
        other.begin(CONFIG, trace_parent="")
    results.end("cancelled", seconds=1.0)
    other.begin(CONFIG, trace_parent="")
    other.end("finished", seconds=1.0)


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    results = with_rounds(tmp_path / "sim", 11)

    assert sorted(path.name for path in (results.path / CHECKPOINTS).iterdir()) == [
        "round-10.safetensors",
        "round-11.safetensors",
    ]


def test_a_simulation_without_rounds_starts_again(tmp_path: Path) -> None:
    results = folder(tmp_path / "sim")
    results.add_round(RoundResult(round=0), model(0))

    assert results.read_checkpoint() == (0, {})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    results = with_rounds(tmp_path / "sim", 1)
    (results.path / CHECKPOINTS / "round-1.safetensors").write_bytes(b"no weights")

    with pytest.raises(
        CliError, match=r"cannot continue after round 1: .*round-1\.safetensors cannot be read"
    ):
        results.read_checkpoint()


def test_the_end_is_recorded_with_the_final_model(tmp_path: Path) -> None:
    results = with_rounds(tmp_path / "sim", 1)
    results.end("cancelled", seconds=2.0, reason="interrupted")
    results.end("finished", model=model(7), seconds=3.0, peak_memory_bytes=10)
    record = ResultsFolder.open(results.path).record

    assert (record.state, record.seconds, record.peak_memory_bytes) == ("finished", 5.0, 10)
    assert weights.load(results.model_path)["w"].tolist() == [7, 7, 7]


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    folder(tmp_path / "sim")

    with pytest.raises(CliError, match="has the results of a simulation"):
        folder(tmp_path / "sim")


def test_a_folder_without_results_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"there is no simulation in .* to resume"):
        ResultsFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "seed: 0, now 1"),
        ({"cohort": 5}, "cohort: none, now 5"),
        ({"overrides": {"lr": 0.1}}, 'overrides: none, now {"lr": 0.1}'),
    ],
)
def test_a_difference_is_named(change: dict[str, Any], difference: str) -> None:
    assert CONFIG.differences(CONFIG.model_copy(update=change)) == [difference]


def test_more_rounds_are_no_difference() -> None:
    assert CONFIG.differences(CONFIG.model_copy(update={"rounds": 9})) == []


def test_folders_are_numbered_by_task(tmp_path: Path) -> None:
    first = new_results_path(tmp_path, "tiny")
    for number in (1, 9, 10):
        folder(first.with_name(f"tiny-sim-{number}"))

    assert first.name == "tiny-sim-1"
    assert new_results_path(tmp_path, "tiny").name == "tiny-sim-11"
    assert latest_results_path(tmp_path, "tiny") == first.with_name("tiny-sim-10")
    assert latest_results_path(tmp_path, "other") is None
