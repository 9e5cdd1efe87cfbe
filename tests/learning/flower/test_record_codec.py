"""The wire format of RecordDicts: round trip, no copies, and rejection of invalid data."""

import contextlib
import copy
import pickle
from io import BytesIO
from typing import Any

import msgpack
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from fedbus.learning.flower.private_api import array_view
from fedbus.learning.flower.record_codec import (
    _PREFIX,
    ALIGNMENT,
    MAGIC,
    VERSION,
    RecordDecodeError,
    decode,
    encode,
)

numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
metric_values = (
    numbers
    | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)
    | st.lists(st.floats(allow_nan=False), max_size=3)
)
config_values = (
    metric_values
    | st.booleans()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.lists(st.text(max_size=3), max_size=3)
    | st.lists(st.booleans(), max_size=3)
)
arrays = np_st.arrays(
    dtype=np_st.scalar_dtypes().filter(lambda dtype: str(dtype) != "object"),
    shape=np_st.array_shapes(min_dims=0, min_side=0, max_side=4),
)
records = st.builds(
    lambda arrays, metrics, configs: RecordDict({**arrays, **metrics, **configs}),
    st.dictionaries(
        st.text(max_size=4).map(lambda name: "a" + name),
        st.dictionaries(st.text(max_size=4), arrays.map(Array), max_size=3).map(ArrayRecord),
        max_size=2,
    ),
    st.dictionaries(
        st.text(max_size=4).map(lambda name: "m" + name),
        st.dictionaries(st.text(max_size=4), metric_values, max_size=3).map(MetricRecord),
        max_size=2,
    ),
    st.dictionaries(
        st.text(max_size=4).map(lambda name: "c" + name),
        st.dictionaries(st.text(max_size=4), config_values, max_size=3).map(
            lambda configs: ConfigRecord({**configs})
        ),
        max_size=2,
    ),
)


def some_records() -> RecordDict:
    weights = {"w": Array(np.arange(6, dtype=np.float32).reshape(2, 3)), "b": Array(np.array(7))}
    return RecordDict({"arrays": ArrayRecord(weights), "metrics": MetricRecord({"loss": 0.5, "n": [1, 2]})})


@given(records)
@settings(max_examples=150, deadline=None)
def test_records_round_trip(before: RecordDict) -> None:
    after = decode(encode(before).to_bytes())
    assert after == before
    assert [list(record) for record in after.values()] == [list(record) for record in before.values()]
    assert [type(record) for record in after.values()] == [type(record) for record in before.values()]


def test_encoding_and_decoding_copy_no_array() -> None:
    array = Array(np.zeros(1000))
    encoded = encode(RecordDict({"arrays": ArrayRecord({"w": array})}))
    assert any(buffer.obj is array.data for buffer in encoded.buffers)

    received = bytearray(encoded.to_bytes())
    record: Any = decode(received)["arrays"]["w"]
    view = array_view(record)
    received[-8:] = np.float64(5).tobytes()
    assert view[-1] == 5.0
    assert view.ctypes.data % ALIGNMENT == np.frombuffer(received, np.uint8).ctypes.data % ALIGNMENT


def test_flowers_code_can_use_a_borrowed_array() -> None:
    array: Any = decode(encode(some_records()).to_bytes())["arrays"]["w"]
    original: Any = some_records()["arrays"]["w"]

    assert isinstance(array.data, bytes)
    assert array.data == original.data
    assert array == original
    assert original == array
    copied = array.numpy()
    copied += 1  # a writeable copy
    assert (array.numpy() == original.numpy()).all()
    assert array.object_id == original.object_id
    assert copy.deepcopy(array) == array
    assert pickle.loads(pickle.dumps(array)) == array
    assert ArrayRecord({"w": array})["w"].data == original.data
    array.data = original.data
    assert array == original


def test_small_contents_without_arrays_are_one_buffer() -> None:
    encoded = encode(RecordDict({"config": ConfigRecord({"lr": 0.1})}))
    assert not encoded.has_arrays
    assert len(encoded.buffers) == 1


def test_legacy_parameters_without_dtype_and_shape_round_trip(tmp_path: object) -> None:
    blob = Array(np.ones(3)).data
    legacy = ArrayRecord(
        {"0": Array(data=blob, dtype="", stype="numpy.ndarray", shape=()), "_empty": Array("", (), "", b"")}
    )
    after: Any = decode(encode(RecordDict({"parameters": legacy})).to_bytes())
    assert after["parameters"]["0"].numpy().tolist() == [1, 1, 1]


def test_an_integer_beyond_64_bits_is_rejected() -> None:
    with pytest.raises(ValueError, match="cannot encode the records"):
        encode(RecordDict({"metrics": MetricRecord({"n": 2**70})}))


def wire(entries: Any, tail: bytes = b"") -> bytes:
    header: bytes = msgpack.packb(entries)
    data = _PREFIX.pack(MAGIC, VERSION, len(header)) + header
    return data + bytes(-len(data) % ALIGNMENT) + tail if tail else data


def npy(array: Any, **options: Any) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, **options)
    serialised: bytes = buffer.getvalue()
    return serialised


def with_shape(data: bytes, shape: str) -> bytes:
    """Return *data* with another shape in its header of the same length."""
    before, _, rest = data.partition(b"'shape': ")
    text, _, elements = rest.partition(b"\n")
    return before + b"'shape': " + f"{shape}, }}".encode().ljust(len(text)) + b"\n" + elements


GOOD = npy(np.zeros(3, np.float32))
OBJECTS = npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)
VAST = with_shape(npy(np.zeros((0, 4), np.float32)), "(0, 999999999999999999, 999999999999999999)")
HUGE = with_shape(GOOD, "(9999999999,)")


def row(data: bytes, dtype: str = "float32", shape: Any = (3,), stype: str = "numpy.ndarray") -> list[Any]:
    return ["w", dtype, list(shape), stype, len(data)]


HOSTILE = {
    "nothing": b"",
    "another format": b"PK\x03\x04" + bytes(20),
    "another version": _PREFIX.pack(MAGIC, 9, 1) + b"\x90",
    "a header beyond the end": _PREFIX.pack(MAGIC, VERSION, 2**32 - 1) + b"\x90",
    "a header that is not msgpack": _PREFIX.pack(MAGIC, VERSION, 1) + b"\xc1",
    "a deeply nested header": _PREFIX.pack(MAGIC, VERSION, 9000) + b"\x91" * 9000,
    "a header of another type": wire({"a": 1}),
    "an entry of another type": wire([1]),
    "an unknown kind of record": wire([["x", "z", {}]]),
    "a duplicate record": wire([["x", "m", {}], ["x", "m", {}]]),
    "a metric that is text": wire([["x", "m", {"loss": "low"}]]),
    "a metric that is None": wire([["x", "m", {"loss": None}]]),
    "a config that is a map": wire([["x", "c", {"k": {"a": 1}}]]),
    "keys that are numbers": wire([["x", "m", {1: 1}]]),
    "a row without its size": wire([["x", "a", [["w", "float32", [3], "numpy.ndarray"]]]]),
    "a negative size": wire([["x", "a", [["w", "float32", [3], "numpy.ndarray", -5]]]]),
    "a size beyond the end": wire([["x", "a", [["w", "float32", [3], "numpy.ndarray", 2**40]]]], GOOD),
    "a shape of text": wire([["x", "a", [row(GOOD, shape="abc")]]], GOOD),
    "a negative dimension": wire([["x", "a", [row(GOOD, shape=[-3])]]], GOOD),
    "too many dimensions": wire([["x", "a", [row(GOOD, shape=[1] * 100)]]], GOOD),
    "a shape that is not the array's": wire([["x", "a", [row(GOOD, shape=[2**40, 2**40])]]], GOOD),
    "a dtype that is not the array's": wire([["x", "a", [row(GOOD, dtype="float64")]]], GOOD),
    "a duplicate array": wire(
        [["x", "a", [row(GOOD), row(GOOD)]]], GOOD + bytes(-len(GOOD) % ALIGNMENT) + GOOD
    ),
    "bytes after the last array": wire([], GOOD),
    "an array of objects": wire([["x", "a", [row(OBJECTS, dtype="object", shape=[1])]]], OBJECTS),
    "an array without a header": wire([["x", "a", [row(b"1234")]]], b"1234"),
    "a .npy header of huge dimensions": wire([["x", "a", [row(HUGE, shape=[9999999999])]]], HUGE),
    "a .npy header of vast dimensions": wire(
        [["x", "a", [row(VAST, shape=[0, 999999999999999999, 999999999999999999])]]], VAST
    ),
    "a .npy header with an invalid dtype": wire([["x", "a", [row(GOOD)]]], GOOD.replace(b"<f4", b"<f3")),
    "a .npy header with code": wire([["x", "a", [row(GOOD)]]], GOOD.replace(b"'<f4', ", b"exit(),")),
    "a truncated .npy header": wire([["x", "a", [row(GOOD[:20])]]], GOOD[:20]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_invalid_data_is_rejected(case: str) -> None:
    with pytest.raises(RecordDecodeError):
        decode(HOSTILE[case])


@given(st.binary(max_size=200), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_corruption_is_rejected_or_harmless(noise: bytes, offset: int) -> None:
    data = bytearray(encode(some_records()).to_bytes())
    data[offset : offset + len(noise)] = noise
    with contextlib.suppress(RecordDecodeError):
        assert isinstance(decode(data), RecordDict)
