"""The data that an app's client gets by its node config."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.data_files import write_mnist

from fedbus.learning.data import DataError, client_data, load_dataset


@pytest.fixture
def images(data_dir: Path) -> np.ndarray:
    return write_mnist(data_dir / "mnist", [number % 5 for number in range(100)])


def node_config(partition_id: int, number: int = 4, **values: Any) -> dict[str, Any]:
    config = {key.replace("_", "-"): value for key, value in values.items()}
    return {"partition-id": partition_id, "num-partitions": number} | config


def test_clients_divide_the_training_set(images: np.ndarray) -> None:
    clients = [client_data("mnist", node_config(number)) for number in range(4)]
    indices = np.concatenate([np.append(one.train_indices, one.test_indices) for one in clients])
    assert sorted(indices) == list(range(100))
    for one in clients:
        assert (len(one.train.labels), len(one.test.labels)) == (20, 5)
        np.testing.assert_array_equal(one.train.images, images[one.train_indices])
        np.testing.assert_array_equal(one.test.labels, one.test_indices % 5)
        assert one.class_names == tuple("01234")


def test_a_device_without_a_partition_has_the_whole_set(images: np.ndarray) -> None:
    client = client_data("mnist", {}, test_share=0)
    assert sorted(client.train_indices) == list(range(100))
    assert len(client.test.labels) == 0


def test_the_node_config_replaces_the_arguments(images: np.ndarray, tmp_path: Path) -> None:
    write_mnist(tmp_path / "other/mnist", [3, 4] * 10)
    chosen = node_config(1, 2, partition="classes:1", partition_seed=7, data_dir=str(tmp_path / "other"))
    client = client_data("mnist", chosen, partition="iid", seed=1, data_dir="/nowhere")
    assert set(client.train.labels) == {4}
    assert str(client.partitioning) == "classes:1"
    by_arguments = client_data(
        "mnist", node_config(1, 2), partition="classes:1", seed=7, data_dir=tmp_path / "other"
    )
    assert by_arguments.train_indices.tolist() == client.train_indices.tolist()


def test_an_app_may_change_its_samples(images: np.ndarray) -> None:
    client = client_data("mnist", node_config(0))
    client.train.images[:] = 0
    assert load_dataset("mnist").train.images.any()


@pytest.mark.parametrize(
    ("samples", "share", "held_out"), [(1, 0.5, 0), (2, 0.01, 1), (3, 0.99, 2), (10, 0.2, 2)]
)
def test_both_sides_of_the_division_have_samples(
    data_dir: Path, samples: int, share: float, held_out: int
) -> None:
    write_mnist(data_dir / "mnist", [0] * samples)
    client = client_data("mnist", {}, test_share=share)
    assert (len(client.test.labels), len(client.train.labels)) == (held_out, samples - held_out)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (node_config(4), "partition-id=4 of the node config must be from 0 to below num-partitions=4"),
        (node_config(-1), "partition-id=-1"),
        ({"partition-id": "first"}, "partition-id='first' of the node config must be a whole number"),
        ({"partition-id": True}, "partition-id=True"),
        ({"num-partitions": 1.5}, "num-partitions=1.5"),
        (node_config(0, partition="dirichlet"), "invalid partitioning 'dirichlet'"),
        (node_config(0, partition_seed=-3), "the seed of partitions is -3"),
        (node_config(0, 101), "100 samples cannot be divided among 101 clients"),
        (node_config(0, data_dir="/nowhere"), "the data folder /nowhere does not exist"),
    ],
)
def test_invalid_node_configs_are_refused(images: np.ndarray, config: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        client_data("mnist", config)


def test_a_test_share_of_everything_is_refused(images: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"test_share is 1\. Use a number from 0 to below 1"):
        client_data("mnist", {}, test_share=1)


def test_numbers_as_text_are_accepted(images: np.ndarray) -> None:
    assert client_data("mnist", {"partition-id": "1", "num-partitions": "2"}).partition_id == 1
