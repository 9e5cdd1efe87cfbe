"""Messages survive the wire, and no bytes of a client can do more than raise BadContent."""

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedbus.learning.functions.message_codec import BadContent, Content, decode, encode, to_metrics
from fedbus.learning.weights import SUPPORTED_DTYPES

WEIGHTS = st.dictionaries(
    st.text(min_size=1, max_size=10).filter(lambda name: name != "__metadata__"),
    st.sampled_from(SUPPORTED_DTYPES).flatmap(
        lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    ),
    max_size=4,
)


@given(WEIGHTS)
def test_weights_of_each_dtype_and_shape_survive(weights: dict[str, Any]) -> None:
    decoded = decode(b"".join(encode(Content({"n": 1}, weights))))
    assert decoded.values == {"n": 1}
    assert list(decoded.weights) == list(weights)
    for name, array in weights.items():
        assert decoded.weights[name].dtype == array.dtype
        np.testing.assert_array_equal(decoded.weights[name], array)


def test_decoded_weights_are_views_that_cannot_be_written_to() -> None:
    weights = decode(b"".join(encode(Content({}, {"w": np.ones(3)})))).weights
    with pytest.raises(ValueError, match="read-only"):
        weights["w"] += 1


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(BadContent):
        decode(data)


@given(st.data())
def test_a_changed_byte_raises_nothing_else(data: st.DataObject) -> None:
    valid = bytearray(b"".join(encode(Content({"a": [1, 2]}, {"w": np.ones((2, 2)), "b": np.ones(1, bool)}))))
    valid[data.draw(st.integers(0, len(valid) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BadContent):
        decode(bytes(valid))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "OBJ", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [10**30, 0], "data_offsets": [0, 0]},
        {"shape": [4], "data_offsets": [0, 16]},
        [],
    ],
)
def test_an_entry_that_does_not_fit_its_bytes_is_refused(entry: object) -> None:
    header = json.dumps({"w": entry}).encode()
    data = (2).to_bytes(8, "little") + b"{}" + len(header).to_bytes(8, "little") + header + bytes(16)
    with pytest.raises(BadContent, match="safetensors"):
        decode(data)


def test_arrays_that_share_bytes_are_refused() -> None:
    """Each boolean array is copied: a small message could otherwise fill the memory of the server."""
    entry = {"dtype": "BOOL", "shape": [16], "data_offsets": [0, 16]}
    header = json.dumps({f"w{number}": entry for number in range(1000)}).encode()
    data = (2).to_bytes(8, "little") + b"{}" + len(header).to_bytes(8, "little") + header + bytes(16)
    with pytest.raises(BadContent, match="does not begin at byte 16"):
        decode(data)


def test_too_many_metrics_and_long_names_are_refused() -> None:
    with pytest.raises(BadContent, match="limit 1000"):
        to_metrics({str(number): 1 for number in range(1001)})
    with pytest.raises(BadContent, match="more than 100 characters"):
        to_metrics({"x" * 101: 1})


def test_metrics_that_are_no_finite_numbers_are_left_out() -> None:
    values = {
        "loss": 1,
        "bad": float("nan"),
        "worse": float("inf"),
        "huge": 10**400,
        "text": "x",
        "flag": True,
    }
    assert to_metrics(values) == {"loss": 1.0, "flag": 1.0}
    with pytest.raises(BadContent, match="not an object"):
        to_metrics([1])
