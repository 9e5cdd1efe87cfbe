"""Loaders, on small files in the original formats: arrays, and errors that name the file."""

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data_files import (
    CIFAR_RECORD_BYTES,
    idx_bytes,
    random_images,
    write_cifar,
    write_idx,
    write_mnist,
)

from fedbus.learning.data import DataError, DataNotFound, ImageDataset, InvalidDataFile, load_dataset

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
SHARED = Path(__file__).parents[4] / "shared" / "data"


def write_png(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_keep_pixels_and_labels(data_dir: Path, suffix: str) -> None:
    images = write_mnist(data_dir / "mnist", [7, 0, 3], suffix=suffix)
    dataset = load_dataset("mnist")
    np.testing.assert_array_equal(dataset.train.images, images)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.tolist() == [7, 0, 3]
    assert dataset.train.labels.dtype == np.int64
    assert dataset.test.images.shape == (2, 4, 4)
    assert dataset.class_names == tuple("01234567")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_are_a_mapped_file_that_cannot_change(data_dir: Path, suffix: str) -> None:
    write_mnist(data_dir / "mnist", [7, 0], suffix=suffix)
    train = load_dataset("mnist").train
    base: object = train.images
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not train.images.flags.writeable
    assert not train.labels.flags.writeable


def test_a_process_loads_a_data_set_once(data_dir: Path) -> None:
    write_mnist(data_dir / "mnist", [1])
    assert load_dataset("mnist") is load_dataset("mnist", data_dir)


def test_a_changed_file_is_read_again_by_a_new_process(data_dir: Path, tmp_path: Path) -> None:
    for folder, labels in (("a", [1]), ("b", [1, 2])):
        write_mnist(data_dir / "mnist", labels)
        (tmp_path / folder).symlink_to(data_dir)  # another path, so that this process does not know it
        assert len(load_dataset("mnist", tmp_path / folder).train.images) == len(labels)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("mnist", "MNIST"),
        ("MNIST/raw", "mnist"),
        ("FashionMNIST/raw", "fashion-mnist"),
        ("deep/mnist", "deep/mnist"),
    ],
)
def test_names_match_the_folders_that_tools_make(data_dir: Path, folder: str, name: str) -> None:
    write_mnist(data_dir / folder, [1, 2])
    assert load_dataset(name).train.labels.tolist() == [1, 2]


def test_files_with_a_dot_before_idx_are_found(data_dir: Path) -> None:
    write_mnist(data_dir / "mnist", [1])
    for file in (data_dir / "mnist").iterdir():
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    assert load_dataset("mnist").train.labels.tolist() == [1]


def test_a_path_is_a_data_set(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "here", [4])
    monkeypatch.chdir(tmp_path)
    assert (
        load_dataset("./here").train.labels.tolist() == load_dataset(tmp_path / "here").train.labels.tolist()
    )


@pytest.mark.parametrize("folder", ["cifar-10", "cifar10/cifar-10-batches-bin", "cifar-10-batches-bin"])
def test_cifar_batches_are_read_in_order(data_dir: Path, folder: str) -> None:
    images = [write_cifar(data_dir / folder / f"data_batch_{n}.bin", [n, 9 - n], seed=n) for n in (1, 2, 3)]
    test = write_cifar(data_dir / folder / "test_batch.bin", [5], seed=9)
    dataset = load_dataset("cifar-10")
    np.testing.assert_array_equal(dataset.train.images, np.concatenate(images))
    np.testing.assert_array_equal(dataset.test.images, test)
    assert dataset.train.labels.tolist() == [1, 8, 2, 7, 3, 6]
    assert (dataset.train.images.shape[1:], dataset.train.labels.dtype) == ((3, 32, 32), np.int64)
    assert dataset.class_names[3] == "cat"


def test_grey_images_have_no_channel(data_dir: Path) -> None:
    pixels = random_images(3, 5, 6)
    for name, one in zip(("cat/a.png", "cat/b.png", "dog/a.png"), pixels, strict=True):
        write_png(data_dir / "pets" / name, one)
    dataset = load_dataset("pets")
    np.testing.assert_array_equal(dataset.train.images, pixels)
    assert dataset.train.labels.tolist() == [0, 0, 1]
    assert dataset.class_names == ("cat", "dog")
    assert dataset.test.images.shape == (0, 5, 6)


def test_colour_images_have_three_channels_first(data_dir: Path) -> None:
    colour, grey = random_images(1, 5, 6, 3)[0], random_images(1, 5, 6)[0]
    write_png(data_dir / "pets/train/cat/a.png", colour)
    write_png(data_dir / "pets/train/dog/a.png", grey)
    write_png(data_dir / "pets/test/dog/b.png", colour)
    dataset = load_dataset("pets")
    np.testing.assert_array_equal(dataset.train.images[0], colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(dataset.train.images[1], np.stack([grey] * 3))
    np.testing.assert_array_equal(dataset.test.images[0], colour.transpose(2, 0, 1))
    assert dataset.test.labels.tolist() == [1]


def test_an_empty_folder_keeps_its_class_number(data_dir: Path) -> None:
    (data_dir / "pets/cat").mkdir(parents=True)
    write_png(data_dir / "pets/dog/a.png", random_images(1, 4, 4)[0])
    assert load_dataset("pets").train.labels.tolist() == [1]


def test_class_names_number_the_folders(data_dir: Path) -> None:
    write_png(data_dir / "pets/dog/a.png", random_images(1, 4, 4)[0])
    assert load_dataset("pets", class_names=["bird", "cat", "dog"]).train.labels.tolist() == [2]
    with pytest.raises(InvalidDataFile, match=r"pets/dog is none of the classes bird, cat"):
        load_dataset("pets", class_names=["bird", "cat"])


def test_images_of_several_sizes_are_resized_on_request(data_dir: Path) -> None:
    write_png(data_dir / "pets/dog/a.png", random_images(1, 4, 4)[0])
    write_png(data_dir / "pets/dog/b.png", random_images(1, 8, 6)[0])
    with pytest.raises(InvalidDataFile, match=r"b\.png has 8 × 6 pixels, but .*a\.png has 4 × 4"):
        load_dataset("pets")
    assert load_dataset("pets", image_size=(3, 5)).train.images.shape == (2, 3, 5)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "train-images-idx3-ubyte does not exist, with or without .gz"),
        (truncate, "train-images-idx3-ubyte.gz is truncated or damaged"),
        (damage, "train-images-idx3-ubyte.gz is truncated or damaged"),
        (lambda file: file.write_bytes(b""), "train-images-idx3-ubyte.gz is not an idx file"),
        (lambda file: file.write_bytes(b"<html>"), "train-images-idx3-ubyte.gz is truncated or damaged"),
        (
            lambda file: file.write_bytes(gzip.compress(b"<html>")),
            "begins with 3c 68 74 6d, expected 00 00 08",
        ),
        (lambda file: file.write_bytes(gzip.compress(b"\0\0\x08\x03\0\0")), "it ends in its header"),
        (
            lambda file: file.write_bytes(gzip.compress(idx_bytes(random_images(3, 4, 4))[:-1])),
            "has 63 bytes, but its header announces 64",
        ),
        (lambda file: write_idx(file, random_images(3, 4)), "has 2 dimensions, but a file of images has 3"),
        (
            lambda file: write_idx(file, random_images(2, 4, 4)),
            "has 2 images, but .*train-labels.* has 3 labels",
        ),
    ],
)
def test_damaged_idx_files_are_named(data_dir: Path, change: Callable[[Path], object], message: str) -> None:
    write_mnist(data_dir / "mnist", [1, 2, 3])
    change(data_dir / "mnist" / TRAIN_IMAGES)
    with pytest.raises(DataError, match=message):
        load_dataset("mnist")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (idx_bytes(random_images(3, 4, 4))[:-1], "has 63 bytes, but its header announces 64"),
    ],
)
def test_damaged_plain_idx_files_are_named(data_dir: Path, content: bytes, message: str) -> None:
    write_mnist(data_dir / "mnist", [1, 2, 3], suffix="")
    (data_dir / "mnist/train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InvalidDataFile, match=f"train-images-idx3-ubyte {message}"):
        load_dataset("mnist")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"data_batch_1.bin": b"\1" * (CIFAR_RECORD_BYTES - 1)},
            "data_batch_1.bin has 3072 bytes, which is not",
        ),
        ({"data_batch_1.bin": b""}, "data_batch_1.bin has 0 bytes"),
        (
            {"data_batch_1.bin": b"\x0a" + b"\0" * (CIFAR_RECORD_BYTES - 1)},
            "data_batch_1.bin has the label 10",
        ),
        ({"data_batch_2.bin": b"\1" * CIFAR_RECORD_BYTES}, "data_batch_1.bin does not exist"),
        (
            {"test_batch.bin": None, "data_batch_1.bin": b"\1" * CIFAR_RECORD_BYTES},
            "test_batch.bin does not exist",
        ),
        ({}, "data_batch_1.bin does not exist"),
        ({"data_batch_0.bin": b"\1" * CIFAR_RECORD_BYTES}, "data_batch_1.bin does not exist. Unpack"),
    ],
)
def test_damaged_cifar_files_are_named(data_dir: Path, files: dict[str, bytes | None], message: str) -> None:
    folder = data_dir / "cifar-10"
    folder.mkdir()
    for name, content in ({"test_batch.bin": b"\1" * CIFAR_RECORD_BYTES} | files).items():
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset("cifar-10")


def test_pickled_cifar_files_are_refused_with_advice(data_dir: Path) -> None:
    (data_dir / "cifar-10/cifar-10-batches-py").mkdir(parents=True)
    (data_dir / "cifar-10/cifar-10-batches-py/data_batch_1").write_bytes(b"pickle")
    with pytest.raises(InvalidDataFile, match=r"download the binary version, cifar-10-binary\.tar\.gz"):
        load_dataset("cifar-10")


def test_an_archive_is_to_be_unpacked(data_dir: Path) -> None:
    (data_dir / "cifar-10").mkdir()
    (data_dir / "cifar-10/cifar-10-binary.tar.gz").write_bytes(b"archive")
    with pytest.raises(InvalidDataFile, match=r"Unpack cifar-10-binary\.tar\.gz"):
        load_dataset("cifar-10")


def test_damaged_images_are_named(data_dir: Path) -> None:
    write_png(data_dir / "pets/dog/a.png", random_images(1, 40, 40)[0])
    content = (data_dir / "pets/dog/a.png").read_bytes()
    (data_dir / "pets/dog/b.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidDataFile, match=r"b\.png is truncated or damaged"):
        load_dataset("pets")
    (data_dir / "pets/dog/b.png").write_bytes(b"no image")
    with pytest.raises(InvalidDataFile, match=r"b\.png is not a readable image"):
        load_dataset("pets")


def test_images_of_16_bits_are_refused(data_dir: Path) -> None:
    write_png(data_dir / "scans/ill/a.png", np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(InvalidDataFile, match=r"a\.png has pixels of mode I;16, not 8 bits"):
        load_dataset("scans")


def test_an_absent_data_set_lists_those_that_exist(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match="which has no folders"):
        load_dataset("mnist")
    (data_dir / "cifar-10").mkdir()
    with pytest.raises(DataNotFound, match=r"'mnist' is not in .*data, which has cifar-10"):
        load_dataset("mnist")
    with pytest.raises(DataNotFound, match=r"nowhere does not exist.* set FEDBUS_DATA_DIR"):
        load_dataset("mnist", tmp_path / "nowhere")
    with pytest.raises(DataNotFound, match="nowhere does not exist"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(InvalidDataFile, match="has no data set: fedbus reads idx files"):
        load_dataset("cifar-10")


def test_an_empty_data_set_is_refused(data_dir: Path) -> None:
    write_mnist(data_dir / "mnist", [])
    with pytest.raises(InvalidDataFile, match="has no training samples"):
        load_dataset("mnist")


def test_loading_imports_neither_flower_nor_torch(data_dir: Path) -> None:
    write_mnist(data_dir / "mnist", list(range(10)))
    program = (
        "import sys; from fedbus.learning.data import client_data; client_data('mnist', {}).train; "
        "print({'flwr', 'flwr_datasets', 'datasets', 'torch', 'pandas', 'matplotlib', 'PIL'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"set()\n"
    )


def real_mnist() -> ImageDataset:
    folder = Path(os.environ.get("FEDBUS_REAL_DATA_DIR", SHARED))
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no MNIST in {folder}")
    return load_dataset("mnist", folder)


def test_the_real_mnist_has_its_known_numbers() -> None:
    dataset = real_mnist()
    assert (dataset.train.images.shape, dataset.test.images.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(dataset.train.labels).tolist() == counts
    assert dataset.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert round(float(dataset.train.images.mean()), 2) == 33.32


@pytest.mark.slow
def test_hugging_face_sets_are_loaded_and_cached(tmp_path: Path) -> None:
    """A folder of Parquet files is such a set, too; without a network, others are refused."""
    program = """
import sys, numpy as np
from fedbus.learning.data import DataError, load_dataset
if sys.argv[1] == "first":
    import datasets
    from PIL import Image
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split, count in (("train", 4), ("test", 2)):
        images = [Image.fromarray(np.full((4, 6, 3), number, np.uint8)) for number in range(count)]
        rows = {"picture": images, "label": [number % 2 for number in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(f"set/{split}.parquet")
dataset = load_dataset("hf:./set")
print(dataset.train.images.shape, dataset.test.images.shape, dataset.train.labels, dataset.class_names)
print(dataset.train.images[3].max(), "datasets" in sys.modules)
try:
    load_dataset("hf:ylecun/mnist")
except DataError as error:
    print(error)
"""
    (tmp_path / "set").mkdir()
    variables = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for attempt, is_imported in (("first", True), ("second", False)):
        command = [sys.executable, "-c", program, attempt]
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables, cwd=tmp_path, check=True
        )
        shapes, pixel, failure = done.stdout.splitlines()
        assert shapes == "(4, 3, 4, 6) (2, 3, 4, 6) [0 1 0 1] ('cat', 'dog')"
        assert pixel == f"3 {is_imported}"
        assert failure.startswith("cannot load hf:ylecun/mnist: Couldn't reach")
