"""The table `[tool.fedbus.aggregation]`."""

from typing import Any

import pytest
from pydantic import ValidationError

from fedbus.contracts.run import RunOverrides, RunPlan
from fedbus.contracts.task.aggregation import AggregationMode, AggregationTable, StrategyName
from fedbus.contracts.task.task import TaskTable


def read(value: object) -> AggregationTable:
    return TaskTable.model_validate({"task": "digits", "aggregation": value}).aggregation


def test_the_short_form_names_the_method() -> None:
    assert read("stock") == read({"method": "stock"})
    with pytest.raises(ValidationError, match="must be one of streaming, stock, or a table"):
        read("stok")


def test_a_parameter_of_another_strategy_is_refused() -> None:
    assert read({"strategy": "fedadam", "eta": 1.0}).eta == 1.0
    with pytest.raises(ValidationError, match="`eta` has no effect: it belongs to strategy 'fedadam'"):
        read({"strategy": "krum", "eta": 1.0})


@pytest.mark.parametrize("strategy", list(StrategyName))
def test_a_table_survives_its_serialisation(strategy: StrategyName) -> None:
    table = AggregationTable(strategy=strategy)
    assert AggregationTable.model_validate_json(table.model_dump_json()) == table


@pytest.mark.parametrize(
    "parameters",
    [
        {"strategy": "fedmagic"},
        {"strategy": "trimmed-mean", "trim-share": 0.5},
        {"strategy": "fedadam", "beta-1": 1.0},
        {"fraction-train": 0.0},
        {"min-clients": 0},
    ],
)
def test_values_out_of_range_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        read(parameters)


def test_a_run_overrides_keys_of_the_table() -> None:
    table = read({"strategy": "fedadam", "eta": 1.0, "buffer-size": 5})
    changed = table.override({"mode": "buffered", "eta": 0.5})
    assert (changed.mode, changed.buffer_size, changed.eta) == (AggregationMode.BUFFERED, 5, 0.5)
    assert table.mode is AggregationMode.SYNC


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"mode": "lazy"}, "`mode` = 'lazy': Input should be 'sync', 'deadline', 'buffered' or 'async'"),
        ({"buffersize": 3}, "`buffersize` is not a key of .*Use one of alpha, .*buffer-size"),
        ({"buffer-size": 0}, "`buffer-size` = 0: .*greater than or equal to 1"),
        ({"alpha": 1.5}, "`alpha` = 1.5: .*less than or equal to 1"),
        ({"deadline-s": 0}, "`deadline-s` = 0: "),
    ],
)
def test_an_invalid_override_has_a_reason_in_one_line(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        AggregationTable.check_overrides(values)
    assert "\n" not in str(error.value)


def test_the_check_of_a_request_leaves_the_strategy_to_the_task() -> None:
    AggregationTable.check_overrides({"eta": 0.5})
    with pytest.raises(ValueError, match="`eta` has no effect"):
        AggregationTable().override({"eta": 0.5})


def test_overrides_of_a_run_are_merged_by_key() -> None:
    first = RunOverrides(aggregation={"mode": "buffered", "buffer-size": 5}, config={"lr": 0.1})
    later = RunOverrides(aggregation={"buffer-size": 7}, rounds=4)
    merged = first.merge(later)
    assert merged.aggregation == {"mode": "buffered", "buffer-size": 7}
    plan = merged.apply_to(RunPlan(aggregation={"mode": "async", "alpha": 0.5}))
    assert plan.aggregation == {"mode": "buffered", "buffer-size": 7, "alpha": 0.5}
    assert (plan.rounds, plan.config) == (4, {"lr": 0.1})
