"""Weights as files, checked with the safetensors library."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from fedbus.learning import weights
from fedbus.learning.flower.array_records import from_record, to_record
from fedbus.learning.weights import Arrays, BadWeights, architecture_digest, first_difference, load, save


def some_arrays() -> Arrays:
    return {
        "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "count": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float16),
        "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "flag": np.array([True, False, True]),
        "bias": np.ones(3, np.float32),
        "big-endian": np.arange(3, dtype=">i4"),
    }


def test_arrays_are_loaded_in_their_order_and_named_by_digest(tmp_path: Path) -> None:
    path = tmp_path / "models" / "a.safetensors"
    artifact = save(some_arrays(), path)

    loaded = load(path)

    assert list(loaded) == list(some_arrays())
    for name, array in some_arrays().items():
        np.testing.assert_array_equal(loaded[name], array)
    assert artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert artifact.size_bytes == path.stat().st_size
    assert artifact.architecture == architecture_digest(loaded)
    assert [one.name for one in path.parent.iterdir()] == ["a.safetensors"]


def test_pack_has_the_bytes_of_the_file_and_shares_the_memory(
    tmp_path: Path,
) -> None:
    arrays = some_arrays()
    artifact, packed = save(arrays, tmp_path / "a"), weights.pack(arrays)
    assert b"".join(packed.buffers) == (tmp_path / "a").read_bytes()
    assert packed.artifact(artifact.sha256) == artifact
    assert any(
        np.shares_memory(np.frombuffer(buffer, np.uint8), arrays["bias"])
        for buffer in packed.buffers
        if len(buffer)
    )


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    save(some_arrays(), tmp_path / "ours")
    assert set(load_file(tmp_path / "ours")) == set(some_arrays())
    assert load_torch_file(tmp_path / "ours")["turned"].shape == (3, 2)
    save_file({"b": np.ones(2), "a": np.zeros(3)}, tmp_path / "theirs")
    assert set(load(tmp_path / "theirs")) == {"a", "b"}


def test_the_same_weights_make_the_same_file(tmp_path: Path) -> None:
    assert save(some_arrays(), tmp_path / "1") == save(some_arrays(), tmp_path / "2")


def test_a_tensor_larger_than_one_write_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_WRITE_BYTES", 1000)
    numbers = np.random.default_rng(0).random(5000)
    save({"w": numbers}, tmp_path / "w")
    np.testing.assert_array_equal(load(tmp_path / "w")["w"], numbers)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "a directory", "a lying header"])
def test_an_invalid_file_is_rejected_with_its_path(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model"
    save(some_arrays(), path)
    whole = path.read_bytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**6], "data_offsets": [0, 4 * 10**6]}}).encode()
    match damage:
        case "missing" | "a directory":
            path.unlink()
            if damage == "a directory":
                path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("hello, I am a pickle")
        case "cut":
            path.write_bytes(whole[:-10])
        case "a lying header":
            path.write_bytes(len(header).to_bytes(8, "little") + header)
        case _:
            pass
    with pytest.raises(BadWeights, match=str(path)):
        load(path)


def test_an_unsupported_tensor_is_rejected_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="'names' is object, which cannot be saved"):
        save({"names": np.array([None])}, tmp_path / "model")
    with pytest.raises(BadWeights, match="__metadata__"):
        save({"__metadata__": np.zeros(1)}, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_is_the_names_shapes_and_dtypes() -> None:
    arrays = some_arrays()
    reordered = dict(reversed(arrays.items()))
    assert architecture_digest(arrays) == architecture_digest(reordered)
    assert first_difference(arrays, reordered) is None
    for changed, difference in [
        (arrays | {"bias": np.ones(4, np.float32)}, "'bias' is float32[4] instead of float32[3]"),
        (arrays | {"bias": np.ones(3)}, "'bias' is float64[3] instead of float32[3]"),
        (arrays | {"more": np.ones(1)}, "'more' float64[1] is not expected"),
        ({name: arrays[name] for name in arrays if name != "count"}, "'count' int64[] is missing"),
    ]:
        assert architecture_digest(arrays) != architecture_digest(changed)
        assert first_difference(arrays, changed) == difference


def test_arrays_from_flower_share_its_memory() -> None:
    record = to_record(some_arrays())
    back = from_record(record)
    assert first_difference(some_arrays(), back) is None
    assert not back["bias"].flags.writeable
    assert np.shares_memory(back["bias"], np.frombuffer(record["bias"].data, np.uint8))


def test_torch_models_convert_both_ways() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    arrays = weights.from_torch(module.state_dict())
    assert arrays["1.num_batches_tracked"].dtype == np.int64
    module.load_state_dict(weights.to_torch(arrays))


def test_a_bfloat16_model_is_rejected_with_advice() -> None:
    with pytest.raises(BadWeights, match=r"'0.weight' is torch.bfloat16, which NumPy.*model.float\(\)"):
        weights.from_torch(torch.nn.Sequential(torch.nn.Linear(2, 3)).bfloat16().state_dict())
