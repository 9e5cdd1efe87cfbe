"""The cells that simulate runs of tasks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.experiment_records import make_record, make_rounds

from fedbus.contracts.run import RoundResult
from fedbus.learning.installed_libraries import open_library
from fedbus.simulation.experiments.errors import InvalidExperiment
from fedbus.simulation.experiments.training import (
    VISION,
    curve,
    final_value,
    load_task,
    merge,
    name_profile,
    read_profile,
    simulation_settings,
    summarize,
    training_cell,
)
from fedbus.simulation.profiles.errors import ProfileError
from fedbus.simulation.profiles.reader import builtin_profiles, load_profile
from fedbus.simulation.settings import SimulationResult
from fedbus.stores.tasks.task_directory import content_version, validate_task

TINY = Path(__file__).parents[2] / "support/tiny_task"


def make_cell(**changes: Any) -> dict[str, Any]:
    return training_cell({"seed": 1}, task=TINY, clients=2, rounds=1, seed=1, **changes).settings


def test_the_settings_of_a_cell_become_those_of_a_simulation() -> None:
    settings = simulation_settings(make_cell(table={"aggregation": {"mode": "deadline", "deadline-s": 3}}))
    assert settings.task.table.aggregation.deadline_s == 3
    assert (settings.clients, settings.rounds, settings.seed, settings.workers) == (2, 1, 1, 1)
    assert settings.deterministic


def test_overrides_reach_the_first_weights_too() -> None:
    """`initial` of the library `functions` gets the task's own configuration."""
    key = next(iter(load_task(TINY).run_config))
    settings = simulation_settings(make_cell(config={key: 7}))
    assert settings.task.run_config[key] == 7
    assert settings.config[key] == 7


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"aggregation": {"mode": "later"}}, "aggregation.mode of .tool.fedbus. is invalid"),
        ({"aggregation": {"eta": -1}}, "aggregation.eta of .tool.fedbus. is invalid"),
        ({"rounds": 0}, "rounds of .tool.fedbus. is invalid"),
        ({"agregation": {}}, "agregation of .tool.fedbus. is invalid"),
    ],
)
def test_an_invalid_table_is_an_error_before_the_cell_runs(table: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidExperiment, match=message):
        make_cell(table=table)


def test_tables_are_merged() -> None:
    assert merge({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": 4}) == {
        "a": {"x": 1, "y": 3},
        "b": 1,
        "c": 4,
    }


def test_the_code_of_the_task_is_part_of_the_settings(tmp_path: Path) -> None:
    copy = tmp_path / "tiny_task"
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert content_version(copy) == content_version(TINY) == make_cell()["code"]
    (copy / "tiny/model.py").write_text("changed")
    assert content_version(copy) != content_version(TINY)


def test_the_task_of_the_experiments_is_valid() -> None:
    assert not validate_task(VISION, open_library)


@pytest.mark.parametrize("name", builtin_profiles())
def test_a_cell_reads_its_profile(name: str) -> None:
    assert read_profile(name_profile(name)) == load_profile(name)


def test_an_unknown_profile_is_an_error() -> None:
    with pytest.raises(ProfileError):
        name_profile("nothing")


def test_a_result_keeps_what_tables_need() -> None:
    rounds = [
        RoundResult(round=0, metrics={"loss": 2.0}),
        RoundResult(
            round=1,
            seconds=2.5,
            metrics={"loss": float("nan"), "accuracy": 0.5},
            participants={"a": 3, "b": 3},
            train_s={"a": 1.0, "b": 2.0},
            figures={"a": {"train_accuracy": 0.4, "train_cpu_s": 0.9}, "b": {"train_accuracy": 0.6}},
        ),
    ]
    result = SimulationResult(rounds=rounds, model={}, seconds=3, simulated_s=2.5, peak_memory_bytes=10**6)
    last = summarize(result)["rounds"][-1]
    assert last == {
        "round": 1,
        "at_s": 2.5,
        "loss": None,
        "accuracy": 0.5,
        "local_accuracy": 0.5,
        "train_s": 1.5,
        "cpu_s_by_client": {"a": 0.9},
        "train_s_by_client": {"a": 1.0, "b": 2.0},
        "updates": 2,
        "failures": {},
    }


def test_values_are_read_from_rounds_that_have_them() -> None:
    record = make_record(make_rounds([0.1, None, 0.3, None], round_s=2))
    assert final_value(record, "accuracy") == 0.3
    assert curve(record, "accuracy", over="at_s") == ([0, 4], [0.1, 0.3])
    assert final_value(record, "local_accuracy") != final_value(record, "local_accuracy")
