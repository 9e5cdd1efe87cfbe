"""Runs that begin with the result of an earlier run, or with its last checkpoint: models of any kind."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from differential import app_apps, legacy_apps, own_strategy_apps, strategy_apps  # noqa: F401 - they register cases
from differential.cases import CASES, arrays
from differential.over_fedbus import BusRun, run_over_fedbus
from differential.recording import compare
from differential.xgboost_apps import ROUNDS, accuracy, read_booster

from fedbus.learning.flower.array_records import from_record
from fedbus.learning.weights import ArchitectureMismatch, Arrays


async def run(tmp_path: Path, name: str, **options: Any) -> BusRun:
    path = Path(tempfile.mkdtemp(dir=tmp_path))
    return await run_over_fedbus(CASES[name], path, **options)


async def run_twice(tmp_path: Path, name: str, **options: Any) -> tuple[BusRun, BusRun]:
    first = await run(tmp_path, name, **options)
    return first, await run(tmp_path, name, model=first.final, **options)


def result_of(outcome: BusRun) -> Any:
    return outcome.recording["server"][-1]["result"]


@pytest.mark.parametrize(
    "name", ["FedAvg", "FedAdam", "FedMedian", "evaluate_fn_without_result", "own_start"]
)
async def test_the_stored_model_is_what_the_app_begins_with(tmp_path: Path, name: str) -> None:
    without = await run(tmp_path, name)
    stored = await run(tmp_path, name, model=from_record(arrays()))
    assert compare(without.recording, stored.recording) == []
    moved = await run(
        tmp_path, name, model={key: array + 100 for key, array in from_record(arrays()).items()}
    )
    assert (moved.final or {})["w"].min() > 99


@pytest.mark.parametrize("name", ["FedAvg", "own_loop_with_a_result", "scikit_learn", "arrays_that_change"])
async def test_the_result_of_a_run_is_the_app_s_own_result(tmp_path: Path, name: str) -> None:
    outcome = await run(tmp_path, name)
    described = result_of(outcome).get("arrays", {})
    names = described.get("arrays", described)
    assert outcome.final is not None
    assert sorted(outcome.final) == sorted(names)


async def test_trees_of_two_runs_are_put_together(tmp_path: Path) -> None:
    first, second = await run_twice(tmp_path, "FedXgbBagging_")
    counts = [_count_trees(outcome.final) for outcome in (first, second)]
    assert counts == [6, 12]  # three rounds of two clients
    assert second.recording["client 0"][0] == {"got": 6}


def _count_trees(model: Arrays | None) -> int:
    booster = json.loads((model or {})["0"].tobytes())
    return len(booster["learner"]["gradient_booster"]["model"]["trees"])


async def test_a_booster_that_is_handed_on_grows_over_two_runs(tmp_path: Path) -> None:
    first, second = await run_twice(tmp_path, "FedXgbCyclic_")
    assert [len((outcome.final or {})["0"]) for outcome in (first, second)] == [5, 9]


@pytest.mark.parametrize(("name", "clients"), [("xgboost_bagging", 2), ("xgboost_cyclic", 1)])
async def test_xgboost_trains_on_in_a_second_run(tmp_path: Path, name: str, clients: int) -> None:
    outcomes = await run_twice(tmp_path, name)
    models = [(outcome.final or {})["0"] for outcome in outcomes]
    trees = ROUNDS * clients
    assert [read_booster(model).num_boosted_rounds() for model in models] == [trees, 2 * trees]
    assert accuracy(models[1]) >= accuracy(models[0]) > 0.8


async def test_legacy_bytes_are_stored_and_given_back_as_bytes(tmp_path: Path) -> None:
    first, second = await run_twice(tmp_path, "parameters_of_bytes")
    assert first.final is not None
    assert list(first.final) == ["0.bytes"]
    got = second.recording["client 0"][0]["got"]["parameters"]
    assert got == [{"bytes": first.final["0.bytes"].tobytes().decode()}]


async def test_an_array_of_an_own_type_comes_back_with_its_type(tmp_path: Path) -> None:
    first, second = await run_twice(tmp_path, "model_of_own_type")
    assert {name: array.tobytes() for name, array in (first.final or {}).items()} == {
        "booster.bytes": b"tree++"
    }
    assert second.recording["client 0"][0]["got"]["arrays"]["booster"] == [
        "tree",
        [],
        "my.booster",
        {"bytes": "tree++"},
    ]
    assert (second.final or {})["booster.bytes"].tobytes() == b"tree++++"


async def test_scikit_learn_trains_on_in_a_second_run(tmp_path: Path) -> None:
    first, second = await run_twice(tmp_path, "scikit_learn")
    assert first.final is not None
    assert second.final is not None
    assert list(first.final) == ["0", "1"]
    assert abs(second.final["0"]).sum() > 0
    assert (second.final["0"] != first.final["0"]).any()


async def test_arrays_that_grew_are_given_back_as_they_are(tmp_path: Path) -> None:
    first, second = await run_twice(tmp_path, "arrays_that_change")
    assert [sorted(outcome.final or {}) for outcome in (first, second)] == [
        ["b+++", "w+++"],
        ["b++++++", "w++++++"],
    ]


async def test_a_fixed_architecture_fails_such_a_run_with_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureMismatch, match=r"'w\+'.* is not expected.*architecture = \"fixed\""):
        await run(tmp_path, "arrays_that_change", architecture="fixed")


async def test_a_part_is_merged_and_heads_stay_on_the_clients(tmp_path: Path) -> None:
    model = {
        f"body.{name}": np.zeros(shape, np.float32) for name, shape in (("weight", (2, 3)), ("bias", (2,)))
    }
    model |= {"head.kernel": np.full((4,), 7.0, np.float32)}
    outcome = await run(tmp_path, "personal_heads", model=model)
    assert outcome.final is not None
    assert list(outcome.final) == list(model)
    assert [float(outcome.final[name].max()) for name in model] == [2.0, 2.0, 7.0]
    assert list(outcome.recording["client 0"][0]["body"]["arrays"]) == ["weight", "bias"]
    assert all(list(stored) == list(model) for _, stored in outcome.rounds)


async def test_analytics_end_without_a_model(tmp_path: Path) -> None:
    outcome = await run(tmp_path, "analytics", model=from_record(arrays()))
    assert outcome.recording["outcome"] == [None]
    assert outcome.final is None


# --- rounds -------------------------------------------------------------------------------------


async def test_the_rounds_of_two_starts_are_counted_on(tmp_path: Path) -> None:
    outcome = await run(tmp_path, "second_start")
    assert [result.round for result, _ in outcome.rounds] == [0, 1, 2, 3, 4, 5]
    assert [sorted(result.participants) for result, _ in outcome.rounds[1:]] == [["c0", "c1"]] * 5
    assert [result.metrics.get("loss") for result, _ in outcome.rounds] == [10.0, 9.0, 8.0, 7.0, 9.0, 8.0]


async def test_a_planned_number_of_rounds_replaces_the_app_s(tmp_path: Path) -> None:
    outcome = await run(tmp_path, "own_number_of_rounds", rounds=2)
    assert [result.round for result, _ in outcome.rounds] == [0, 1, 2]


@pytest.mark.parametrize(("first_round", "names"), [(3, ["warm", "fine"]), (4, ["fine"]), (5, ["fine"])])
async def test_a_resumed_run_ends_like_one_that_was_not_lost(
    tmp_path: Path, first_round: int, names: list[str]
) -> None:
    whole = await run(tmp_path, "second_start")
    checkpoint = whole.rounds[first_round - 1][1]
    resumed = await run(tmp_path, "second_start", model=checkpoint, first_round=first_round)

    assert [result.round for result, _ in resumed.rounds] == list(range(first_round, 6))
    for name, array in (whole.final or {}).items():
        np.testing.assert_allclose((resumed.final or {})[name], array, rtol=1e-5)
    for name in names:
        expected, actual = (outcome.recording["server"][-1][name] for outcome in (whole, resumed))
        rounds = actual["train_metrics_clientapp"]
        assert rounds.items() <= expected["train_metrics_clientapp"].items()
        assert compare(expected["arrays"], actual["arrays"]) == []


async def test_a_resumed_legacy_run_continues_its_rounds(tmp_path: Path) -> None:
    whole = await run(tmp_path, "legacy_functions")
    resumed = await run(tmp_path, "legacy_functions", model=whole.rounds[2][1], first_round=3)
    assert [result.round for result, _ in resumed.rounds] == [3]
    assert [entry["config"]["ConfigRecord"] for entry in resumed.recording["client 0"] if "fit" in entry] == [
        {"round": 3, "lr": 0.5 / 3}
    ]
    for name, array in (whole.final or {}).items():
        np.testing.assert_allclose((resumed.final or {})[name], array, rtol=1e-5)
