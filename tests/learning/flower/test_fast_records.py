"""The names of Flower that fedbus replaces in a client's process give the results of Flower's originals."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
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


class OwnState(dict[str, torch.Tensor]):
    """A state dict that hides keys."""

    def keys(self) -> Any:
        return [key for key in self if not key.startswith("_")]


def outcome_of(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return the arrays of the result, or the type and the text of the error."""
    try:
        record = function(*args, **options)
    except Exception as error:  # noqa: BLE001 - any error is an outcome
        return type(error), str(error)
    return {key: array.numpy().tolist() for key, array in record.items()}


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize(
    "state",
    [
        {1: torch.ones(1), "a": torch.ones(2)},
        {"a": torch.ones(2), None: torch.ones(1), "b": torch.ones(1)},
        {"a": torch.ones(1), "b": 5.0},
        OwnState(a=torch.ones(1), _hidden=torch.ones(2)),
    ],
    ids=["integer", "none", "no tensor", "own keys"],
)
def test_a_direct_call_has_the_outcome_of_flower(state: dict[Any, Any], *, is_kept: bool) -> None:
    ours, flowers = copy(state), copy(state)
    call, stock = ArrayRecord.from_torch_state_dict, STOCK_FROM_TORCH.__get__(None, ArrayRecord)
    assert outcome_of(call, ours, keep_input=is_kept) == outcome_of(stock, flowers, keep_input=is_kept)
    assert ours == flowers, "the same tensors remain"


def test_without_torch_a_direct_call_fails_as_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": torch.ones(1)}
    stock = STOCK_FROM_TORCH.__get__(None, ArrayRecord)
    monkeypatch.delitem(sys.modules, "torch")
    error = outcome_of(ArrayRecord.from_torch_state_dict, state)
    assert error == outcome_of(stock, state)
    assert error[0] is RuntimeError


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


class HidingRecords(RecordDict):
    """A subclass that hides records, and counts the writes."""

    def __init__(self, records: dict[str, Any]) -> None:
        self.__dict__["writes"] = []
        super().__init__(records)

    def items(self) -> Any:
        return [(name, record) for name, record in super().items() if not name.startswith("_")]

    def __setitem__(self, name: str, record: Any) -> None:
        self.__dict__["writes"].append(name)
        super().__setitem__(name, record)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_uses_the_methods_that_a_subclass_overrides(name: str) -> None:
    content = {"_a": ArrayRecord(), "a": ArrayRecord(), "m": MetricRecord(), "c": ConfigRecord()}
    ours, flowers = HidingRecords(content), HidingRecords(content)
    fast, stock = getattr(ours, name), stock_view(flowers, name)
    assert list(fast) == list(stock)
    assert ours.__dict__["writes"] == flowers.__dict__["writes"]


def test_a_view_uses_items_that_an_app_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    records = RecordDict({"a": ConfigRecord(), "b": ConfigRecord()})
    first = [("a", records["a"])]
    monkeypatch.setattr(RecordDict, "items", lambda _: first, raising=False)
    assert list(records.config_records) == list(stock_view(records, "config_records")) == ["a"]


def test_old_names_of_the_views_have_the_same_records() -> None:
    records = RecordDict({"metrics": MetricRecord({"loss": 0.5})})
    assert records.metrics_records == records.metric_records
