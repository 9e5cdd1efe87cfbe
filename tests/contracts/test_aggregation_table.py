"""The table `[tool.fedbus.aggregation]`."""

import pytest
from pydantic import ValidationError

from fedbus.contracts.task.aggregation import AggregationTable, StrategyName
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
