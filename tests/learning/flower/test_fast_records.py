"""The names of Flower that fedbus replaces in a client's process give the results of Flower's originals."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbus.learning.flower.private_api import install_fast_records, make_array

VIEWS = {"array_records": ArrayRecord, "metric_records": MetricRecord, "config_records": ConfigRecord}
STOCK_VIEWS: dict[str, Any] = {name: RecordDict.__dict__[name] for name in VIEWS}
STOCK_FROM_TORCH: Any = ArrayRecord.__dict__["from_torch_state_dict"]
"""Taken when the tests are collected: before any test installs the replacements."""

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
]
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scalar": lambda numbers: numbers[0],
    "empty": lambda numbers: numbers[:0],
    "vector": lambda numbers: numbers,
    "C order": lambda numbers: numbers.reshape(2, 3, 4),
    "Fortran order": lambda numbers: numbers.reshape(2, 3, 4).permute(2, 1, 0),
    "other order": lambda numbers: numbers.reshape(2, 3, 4).permute(1, 0, 2),
    "strided": lambda numbers: numbers.reshape(4, 6)[::2, ::3],
    "repeated": lambda numbers: numbers[:3].expand(4, 3),
    "both orders": lambda numbers: numbers.reshape(1, 24).t(),
}
RECORDS = st.sampled_from(
    [ArrayRecord({"w": Array(np.ones(2))}), MetricRecord({"loss": 0.5}), ConfigRecord({"lr": 0.1})]
)


@pytest.fixture(autouse=True)
def fast_records(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, view in STOCK_VIEWS.items():
        assert view.fget.__module__.startswith("flwr.")
        monkeypatch.setattr(RecordDict, name, view)  # and set it back after the test
    assert STOCK_FROM_TORCH.__func__.__module__.startswith("flwr.")
    monkeypatch.setattr(ArrayRecord, "from_torch_state_dict", STOCK_FROM_TORCH)
    install_fast_records()


def stock_view(records: RecordDict, name: str) -> Any:
    return STOCK_VIEWS[name].fget(records)


def from_torch_by_flower(state: dict[str, torch.Tensor]) -> ArrayRecord:
    record: ArrayRecord = STOCK_FROM_TORCH.__func__(ArrayRecord, state)
    return record


# --- arrays of torch ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_dict_gives_the_arrays_of_flower(
    dtype: torch.dtype, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    state = OrderedDict(w=layout(torch.arange(24).to(dtype)))
    fast, stock = ArrayRecord(state)["w"], from_torch_by_flower(state)["w"]
    assert (fast.dtype, fast.shape, fast.stype) == (stock.dtype, stock.shape, stock.stype)
    for ours, flowers in ((fast.numpy(), stock.numpy()), (fast.numpy(), state["w"].numpy())):
        np.testing.assert_array_equal(ours, flowers)
        assert ours.dtype == flowers.dtype
    assert fast.numpy().flags.c_contiguous == stock.numpy().flags.c_contiguous
    np.testing.assert_array_equal(Array(**_fields(fast)).numpy(), stock.numpy())  # of the bytes alone


def test_the_arrays_are_a_copy_of_the_model() -> None:
    weights = torch.zeros(3)
    record = ArrayRecord(OrderedDict(w=weights))
    weights += 1
    assert record["w"].numpy().tolist() == [0, 0, 0]
    record["w"].numpy()[:] = 5
    assert record["w"].numpy().tolist() == [0, 0, 0]


def test_a_parameter_with_a_gradient_is_detached() -> None:
    record = ArrayRecord(OrderedDict(w=torch.nn.Parameter(torch.ones(2))))
    assert record["w"].numpy().tolist() == [1, 1]


def test_the_input_is_emptied_if_it_is_not_kept() -> None:
    state = OrderedDict(a=torch.ones(1), b=torch.ones(2))
    record = ArrayRecord.from_torch_state_dict(state, keep_input=False)
    assert list(record) == ["a", "b"]
    assert not state


def test_a_record_of_a_state_dict_loads_into_a_model() -> None:
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(ArrayRecord(model.state_dict()).to_torch_state_dict())
    assert torch.equal(model.weight, other.weight)


class OwnRecord(ArrayRecord):
    """A subclass, of which Flower makes no instance."""


def test_a_subclass_gets_what_flower_returns() -> None:
    state = {"w": torch.ones(2)}
    assert type(OwnRecord.from_torch_state_dict(state)) is type(STOCK_FROM_TORCH.__func__(OwnRecord, state))


class OwnArray(np.ndarray[Any, Any]):
    """A subclass, whose elements may not be those of its memory."""


@pytest.mark.parametrize(
    "array",
    [
        np.ones(3).view(OwnArray),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        np.ones(3, ">f4"),
        np.array(["a", "b"]),
        np.array(["2026-11-30"], "M8[D]"),
        np.zeros(2, [("x", "f4"), ("y", "i8")]),
    ],
    ids=["subclass", "masked", "foreign byte order", "text", "time", "fields"],
)
def test_an_array_of_another_kind_is_made_by_flower(array: np.ndarray[Any, Any]) -> None:
    assert type(make_array(array)) is Array


def _fields(array: Array) -> dict[str, Any]:
    return {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VIEWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(st.text(max_size=2), RECORDS))
def test_a_view_has_the_records_of_flowers_view(name: str, content: dict[str, Any]) -> None:
    records = RecordDict(content)
    fast, stock = getattr(records, name), stock_view(records, name)
    assert type(fast) is type(stock)
    assert list(fast) == list(stock)
    assert all(fast[key] is stock[key] is records[key] for key in stock)
    assert fast == stock


@pytest.mark.parametrize("view_of", [getattr, stock_view], ids=["fedbus", "flower"])
def test_a_change_of_a_view_changes_the_records(view_of: Callable[[RecordDict, str], Any]) -> None:
    records = RecordDict({"old": MetricRecord({"loss": 0.5}), "config": ConfigRecord()})
    view = view_of(records, "metric_records")
    view["new"] = MetricRecord({"loss": 0.1})
    del view["old"]
    assert list(records) == ["config", "new"]
    assert list(view) == list(records.metric_records) == ["new"]
    with pytest.raises(TypeError, match="MetricRecord"):
        view["other"] = ConfigRecord()


@pytest.mark.parametrize("view_of", [getattr, stock_view], ids=["fedbus", "flower"])
def test_a_view_does_not_follow_later_changes(view_of: Callable[[RecordDict, str], Any]) -> None:
    records = RecordDict({"a": ConfigRecord()})
    view = view_of(records, "config_records")
    records["b"] = ConfigRecord()
    assert list(view) == ["a"]


class OwnRecords(RecordDict):
    """A subclass."""


def test_a_subclass_of_the_records_has_the_same_views() -> None:
    records = OwnRecords({"metrics": MetricRecord({"loss": 0.5}), "own": ArrayRecord()})
    assert all(getattr(records, name) == stock_view(records, name) for name in VIEWS)


def test_old_names_of_the_views_have_the_same_records() -> None:
    records = RecordDict({"metrics": MetricRecord({"loss": 0.5})})
    assert records.metrics_records == records.metric_records
