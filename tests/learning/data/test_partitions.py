"""Partitions: their laws, their equality with flwr-datasets, and the cache that processes share."""

import multiprocessing
import os
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from flwr_datasets.partitioner import IidPartitioner, LinearPartitioner, PathologicalPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbus.learning.data import InvalidPartitioning, LabelDistribution, Partitioning, partition_labels
from fedbus.learning.data import partitions as partitions_module
from fedbus.learning.data.partitioners import apportion, assign_classes, compute_partitions

LABELS = np.random.default_rng(0).integers(0, 10, 2000)
SPECS = [
    "iid",
    "dirichlet:0.1",
    "dirichlet:10",
    "classes:1",
    "classes:3",
    "sizes:linear",
    "sizes:square",
    "sizes:exponential",
    "sizes:lognormal:1",
    "classes:2+sizes:square",
    "classes:3+sizes:lognormal:2",
]


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=120).map(np.array),
    spec=st.sampled_from(SPECS),
    number=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
)
def test_each_partition_has_samples_of_its_own(labels: np.ndarray, spec: str, number: int, seed: int) -> None:
    partitioning = Partitioning.parse(spec)
    try:
        parts = compute_partitions(labels, partitioning, number, seed)
    except InvalidPartitioning:
        assert spec not in {"iid", "dirichlet:0.1", "dirichlet:10", "sizes:lognormal:1"} or number > len(
            labels
        )
        return
    assert len(parts) == number
    assert min(map(len, parts)) > 0
    chosen = np.concatenate(parts)
    assert len(np.unique(chosen)) == len(chosen)
    if partitioning.classes is None or number * partitioning.classes >= len(np.unique(labels)):
        assert len(chosen) == len(labels)
    if partitioning.classes is not None:
        assert {len(np.unique(labels[part])) for part in parts} == {partitioning.classes}
        assert len(chosen) == np.isin(labels, labels[chosen]).sum()


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 12))
def test_each_class_has_equally_many_clients(clients: int, per_client: int, more: int) -> None:
    chosen = assign_classes(clients, per_client, per_client + more)
    assert {len(set(one)) for one in chosen} == {per_client}
    counts = np.bincount(np.concatenate(chosen), minlength=per_client + more)
    assert counts.max() - counts.min() <= 1


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=20), st.integers(0, 500))
def test_an_apportionment_keeps_the_total_and_the_order(weights: list[float], spare: int) -> None:
    sizes = apportion(spare + len(weights), np.array(weights))
    assert sizes.sum() == spare + len(weights)
    assert sizes.min() >= 1
    order = np.argsort(weights)
    sorted_weights, sorted_sizes = np.array(weights)[order], sizes[order]
    is_heavier = np.diff(sorted_weights) > 0
    assert (np.diff(sorted_sizes)[is_heavier] >= 0).all()


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_seed_gives_the_same_partitions(spec: str) -> None:
    first, again, other = (
        compute_partitions(LABELS, Partitioning.parse(spec), 6, seed) for seed in (1, 1, 2)
    )
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert [part.tolist() for part in first] != [part.tolist() for part in other]


@pytest.mark.parametrize(
    ("spec", "partitioner"),
    [
        ("iid", IidPartitioner(10)),
        ("sizes:linear", LinearPartitioner(10)),
        ("classes:1", PathologicalPartitioner(10, "label", 1, "deterministic", seed=3)),
    ],
)
def test_partitions_are_those_of_flwr_datasets(spec: str, partitioner: IidPartitioner) -> None:
    """On the shuffled data set, as its own FederatedDataset does it."""
    order = np.random.default_rng(3).permutation(len(LABELS))
    partitioner.dataset = datasets.Dataset.from_dict({"label": LABELS[order], "index": order})
    parts = compute_partitions(LABELS, Partitioning.parse(spec), 10, 3)
    for number, part in enumerate(parts):
        assert part.tolist() == list(partitioner.load_partition(number)["index"])


def test_classes_are_even_and_both_is_not() -> None:
    labels = np.repeat(np.arange(10), 100)
    even = partition_labels(labels, "classes:2", 10)
    assert even.sizes.tolist() == [100] * 10
    both = partition_labels(labels, "classes:2+sizes:linear", 10)
    assert both.sizes.sum() == 1000
    assert both.sizes[9] > 2 * both.sizes[0]
    assert [np.unique(labels[part]).tolist() for part in both] == [
        np.unique(labels[part]).tolist() for part in even
    ]


def test_a_small_alpha_skews_the_labels() -> None:
    skews = [
        LabelDistribution.of(
            LABELS, partition_labels(LABELS, f"dirichlet:{alpha}", 20), tuple("0123456789")
        ).skew
        for alpha in (0.1, 1, 100)
    ]
    assert skews[0] > skews[1] > skews[2]
    assert (skews[0] > 0.6, skews[2] < 0.15) == (True, True)


@pytest.mark.parametrize(
    ("spec", "number", "message"),
    [
        ("iid", 2001, "2000 samples cannot be divided among 2001 clients. Use at most 2000 clients"),
        ("iid", 0, "0 partitions: use at least 1 client"),
        ("classes:11", 5, "classes:11 asks for more classes than there are \\(10\\). Use at most classes:10"),
        (
            "classes:9",
            1000,
            "classes:9 with 1000 clients needs more samples .* Use fewer clients or fewer classes",
        ),
        ("sizes:exponential", 30, "sizes:exponential leaves a client without samples.* or sizes:lognormal:1"),
        ("sizes:square", 500, "sizes:square leaves a client without samples: there are 2000 samples for 500"),
    ],
)
def test_impossible_partitions_name_the_option(spec: str, number: int, message: str) -> None:
    with pytest.raises(InvalidPartitioning, match=message):
        partition_labels(LABELS, spec, number)


def test_a_seed_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidPartitioning, match="the seed of partitions is -1"):
        partition_labels(LABELS, "iid", 3, seed=-1)


def test_texts_are_labels_too() -> None:
    labels = np.array(["cat", "dog"] * 50)
    parts = partition_labels(labels, "classes:1", 2)
    assert [set(labels[part]) for part in parts] == [{"cat"}, {"dog"}]


def test_no_warning_reaches_the_app() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition_labels(LABELS, "classes:1", 3)
        partition_labels(LABELS, "dirichlet:0.001", 50)


def test_the_second_call_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = partition_labels(LABELS, "classes:2", 6, seed=4)
    monkeypatch.setattr(partitions_module, "compute_partitions", None)
    again = partition_labels(LABELS, "classes:2", 6, seed=4)
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert (len(again), again[-1].tolist(), [len(part) for part in again[1:3]]) == (
        6,
        first[5].tolist(),
        again.sizes[1:3].tolist(),
    )
    assert not again[0].flags.writeable
    with pytest.raises(IndexError):
        again[6]


@pytest.mark.parametrize(
    "change",
    [{"labels": LABELS[::-1]}, {"partitioning": "iid"}, {"num_partitions": 7}, {"seed": 5}],
    ids=["labels", "partitioning", "clients", "seed"],
)
def test_other_arguments_are_other_entries(change: dict[str, object], tmp_path: Path) -> None:
    arguments = {"labels": LABELS, "partitioning": "classes:2", "num_partitions": 6, "seed": 4}
    for one in (arguments, arguments | change):
        partition_labels(**one)  # type: ignore[arg-type]  # arguments of mixed types
    assert len(entries(tmp_path)) == 2


def entries(tmp_path: Path) -> list[Path]:
    return [one for one in (tmp_path / "home/cache/data").iterdir() if one.is_dir()]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\0" * 200])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, content: bytes) -> None:
    first = [part.tolist() for part in partition_labels(LABELS, "iid", 6)]
    (entries(tmp_path)[0] / "indices.npy").write_bytes(content)
    assert [part.tolist() for part in partition_labels(LABELS, "iid", 6)] == first


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    partition_labels(LABELS, "iid", 6)
    entry = entries(tmp_path)[0]
    entry.rename(entry.with_name(f".{entry.name}.abc.part"))
    partition_labels(LABELS, "iid", 6)
    assert entries(tmp_path) == [entry]


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs a path that is no folder"
)
def test_without_a_writable_cache_arrays_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = partition_labels(LABELS, "iid", 6)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FEDBUS_HOME", str(tmp_path / "file"))
    again = partition_labels(LABELS, "iid", 6)
    assert [part.tolist() for part in again] == [part.tolist() for part in first]
    assert not again[0].flags.writeable


def count_computations(folder: str, start: "multiprocessing.synchronize.Barrier") -> None:
    os.environ["FEDBUS_HOME"] = folder

    def compute(*arguments: object) -> list[np.ndarray]:
        with (Path(folder) / "computations").open("a") as file:
            file.write("x")
        return compute_partitions(*arguments)  # type: ignore[arg-type]  # arguments of mixed types

    vars(partitions_module)["compute_partitions"] = compute
    start.wait()
    assert partition_labels(LABELS, "classes:2", 5, seed=9).sizes.sum() == len(LABELS)


def test_of_many_processes_one_computes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(8)
    (tmp_path / "home").mkdir()
    processes = [
        context.Process(target=count_computations, args=(str(tmp_path / "home"), start)) for _ in range(8)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert (tmp_path / "home/computations").read_text() == "x"
