"""The encodings of updates: bounds of their errors, error feedback, and hostile bytes."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from fedbus.contracts.task.compression import CompressionTable
from fedbus.contracts.task.task import TaskTable
from fedbus.learning.compression import (
    BadEncoding,
    Bf16,
    Encoding,
    Int8,
    TopK,
    apply_update,
    decode,
    encode_update,
    is_compressible,
    make_encoding,
)

ENCODINGS = [Bf16(), Int8(), TopK(share=0.3)]
floats = st.floats(-(2.0**100), 2.0**100, width=32)
vectors = st_numpy.arrays(np.float32, st.integers(1, 60), elements=floats)
encodings = st.sampled_from(ENCODINGS)


def transfer(encoding: Encoding, values: np.ndarray) -> np.ndarray:
    return decode(encoding.name, memoryview(encoding.encode(values)), values.size)


# --- laws -----------------------------------------------------------------------------------


@given(vectors)
def test_bf16_has_a_small_relative_error(values: np.ndarray) -> None:
    error = np.abs(transfer(Bf16(), values) - values)
    assert (error <= np.abs(values) * 2.0**-8 + 2.0**-133).all()  # below the smallest normal number: absolute


@given(vectors)
def test_int8_is_wrong_by_at_most_half_its_scale(values: np.ndarray) -> None:
    largest = np.abs(values).max()
    error = np.abs(transfer(Int8(), values).astype(np.float64) - values)
    assert (error <= largest / 254 * (1 + 1e-5) + 2.0**-119).all()


@given(vectors, st.floats(0.01, 0.5))
def test_top_k_sends_the_largest_values_exactly(values: np.ndarray, share: float) -> None:
    decoded = transfer(TopK(share=share), values)
    sent = decoded != 0
    assert (decoded[sent] == values[sent]).all()
    count = max(1, round(share * values.size))
    assert sent.sum() == min(count, np.count_nonzero(values))
    assert np.abs(values[~sent]).max(initial=0) <= np.abs(values[sent]).min(initial=np.inf)


@given(encodings, vectors)
def test_an_error_is_never_larger_than_the_update(encoding: Encoding, values: np.ndarray) -> None:
    """All encodings are contractions, which convergence with error feedback needs."""
    exact, decoded = values.astype(np.float64), transfer(encoding, values).astype(np.float64)
    assert np.linalg.norm(exact - decoded) <= np.linalg.norm(exact) * (1 + 1e-6)


small = st.floats(-100, 100, width=32)
rounds = st_numpy.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 10)), elements=small)


@given(encodings, rounds)
def test_the_sum_of_decoded_updates_lacks_only_the_last_error(
    encoding: Encoding, updates: np.ndarray
) -> None:
    zero = np.zeros(updates.shape[1], np.float64)
    residual, received = zero, zero.copy()
    for update in updates.astype(np.float64):
        encoded = encode_update(encoding, update, zero, residual)
        received += apply_update(encoding.name, encoded.data, zero)
        residual = encoded.error
    np.testing.assert_allclose(received, updates.astype(np.float64).sum(axis=0) - residual, atol=1e-9)


@given(vectors, st.sampled_from([np.float16, np.float32, np.float64, ">f4"]))
def test_the_result_has_the_dtype_and_shape_of_the_reference(values: np.ndarray, dtype: str) -> None:
    reference = np.ones((1, values.size, 1), dtype)
    trained = reference + np.clip(values, -100, 100).reshape(reference.shape).astype(dtype)
    for encoding in ENCODINGS:
        data = encode_update(encoding, trained, reference).data
        result = apply_update(encoding.name, data, reference)
        assert result.shape == reference.shape
        assert result.dtype == reference.dtype.newbyteorder("=")
        assert result.flags.c_contiguous


# --- sizes and edges ------------------------------------------------------------------------


def test_the_sizes_are_those_of_the_documentation() -> None:
    values = np.random.default_rng(1).normal(size=10_000).astype(np.float32)
    sizes = {encoding.name: len(encoding.encode(values)) for encoding in (Bf16(), Int8(), TopK())}
    assert sizes == {"bf16": 20_000, "int8": 10_004, "top-k": 800}


def test_bf16_rounds_ties_to_even() -> None:
    values = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001], np.uint32).view(np.float32)
    rounded = transfer(Bf16(), values).view(np.uint32)
    assert [hex(bits) for bits in rounded] == ["0x3f800000", "0x3f820000", "0x3f810000"]


def test_an_update_without_a_change_is_exact() -> None:
    zeros = np.zeros(5, np.float32)
    for encoding in ENCODINGS:
        assert (transfer(encoding, zeros) == 0).all()
    assert len(TopK().encode(zeros)) == 0


def test_values_too_small_for_a_scale_stay_in_the_residual() -> None:
    values = np.full(3, 1e-44, np.float32)
    encoded = encode_update(Int8(), values, np.zeros(3, np.float32))
    np.testing.assert_array_equal(encoded.error, values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_an_update_beyond_float32_is_refused(bad: float) -> None:
    for encoding in ENCODINGS:
        with pytest.raises(BadEncoding, match="NaN, infinity, or a value beyond float32"):
            encode_update(encoding, np.array([1.0, bad]), np.zeros(2))


def test_bf16_refuses_a_value_that_rounds_to_infinity() -> None:
    with pytest.raises(BadEncoding, match="NaN or infinity"):
        encode_update(Bf16(), np.array([np.finfo(np.float32).max]), np.zeros(1, np.float32))


def test_a_residual_of_another_shape_is_dropped() -> None:
    encoded = encode_update(Int8(), np.ones(3), np.zeros(3), np.full(4, 9.0))
    np.testing.assert_allclose(apply_update("int8", encoded.data, np.zeros(3)), 1)


def test_only_arrays_of_real_floats_are_compressed() -> None:
    dtypes = ["float16", "float32", "float64", "int64", "bool", "complex64", "uint8"]
    compressible = [name for name in dtypes if is_compressible(np.zeros(2, name))]
    assert compressible == ["float16", "float32", "float64"]
    assert not is_compressible(np.zeros(0, np.float32))


# --- hostile bytes --------------------------------------------------------------------------


def int8_data(scale: float, size: int) -> bytes:
    return np.float32(scale).tobytes() + bytes(size)


def top_k_data(indices: list[int], values: list[float]) -> bytes:
    return np.array(indices, "<u4").tobytes() + np.array(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("bf16", bytes(7), "7 bytes instead of 8"),
        ("bf16", b"\x80\x7f" * 4, "NaN or infinity"),
        ("int8", int8_data(1, 3), "7 bytes instead of 8"),
        ("int8", b"", "0 bytes instead of 8"),
        ("int8", int8_data(np.nan, 4), "scale nan"),
        ("int8", int8_data(np.inf, 4), "scale inf"),
        ("int8", int8_data(3e38, 4), r"scale 3\.0.*e\+38"),
        ("int8", int8_data(-1, 4), "scale -1"),
        ("top-k", bytes(7), "7 bytes are not at most 4 pairs"),
        ("top-k", bytes(5 * 8), "40 bytes are not at most 4 pairs"),
        ("top-k", top_k_data([4], [1]), r"index 4 is out of range \(4 values\)"),
        ("top-k", top_k_data([2, 1], [1, 1]), "not in ascending order"),
        ("top-k", top_k_data([1, 1], [1, 1]), "not in ascending order"),
        ("top-k", top_k_data([9, 1], [1, 1]), "not in ascending order"),
        ("top-k", top_k_data([1], [np.nan]), "NaN or infinity"),
        ("gzip", b"", "'gzip' is unknown"),
        ("x" * 1000, b"", "'x{40}' is unknown"),
    ],
)
def test_hostile_bytes_are_refused(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(BadEncoding, match=reason):
        apply_update(name, data, np.zeros((2, 2), np.float32))


def test_an_update_that_overflows_the_weights_is_refused() -> None:
    weights = np.full(4, 3e38, np.float32)
    with pytest.raises(BadEncoding, match="the weights with this update have a NaN or infinity"):
        apply_update("top-k", top_k_data([1], [3e38]), weights)


@given(encodings, st.binary(max_size=64), st.integers(1, 20))
def test_any_bytes_decode_to_finite_values_or_are_refused(encoding: Encoding, data: bytes, size: int) -> None:
    try:
        values = decode(encoding.name, memoryview(data), size)
    except BadEncoding:
        return
    assert values.shape == (size,)
    assert np.isfinite(values).all()


# --- configuration --------------------------------------------------------------------------


def test_the_table_makes_an_encoding() -> None:
    assert make_encoding(CompressionTable()) is None
    assert make_encoding(CompressionTable.model_validate("bf16")) == Bf16()
    assert make_encoding(CompressionTable.model_validate("int8")) == Int8()
    table = {"method": "top-k", "share": 0.1, "error-feedback": False}
    assert make_encoding(CompressionTable.model_validate(table)) == TopK(share=0.1, error_feedback=False)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("gzip", "must be one of none, bf16, int8, top-k, or a table"),
        ({"method": "int8", "share": 0.1}, "`share` has no effect: it belongs to method 'top-k'"),
        ({"method": "top-k", "share": 0.7}, "less than or equal to 0.5"),
    ],
)
def test_a_wrong_table_is_refused(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CompressionTable.model_validate(value)


def test_the_tables_of_the_guide_are_valid() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "privacy-and-compression.md").read_text()
    tables = [
        tomllib.loads(block)["tool"]["fedbus"] for block in re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    ]
    parsed = [TaskTable.model_validate({"task": "t", **table}).compression for table in tables]
    assert parsed == [CompressionTable(method="int8"), CompressionTable(method="top-k")]


def test_a_share_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share is 0\.7\. Use more than 0 and at most 0\.5"):
        TopK(share=0.7)
