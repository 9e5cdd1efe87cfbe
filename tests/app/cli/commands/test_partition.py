"""`fedbus data partition`: the label distribution of a data set's partitions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.cli import CliResult, run_fedbus
from support.data_files import write_mnist

from fedbus.app.failures import ExitCode
from fedbus.learning.data import partition_labels


@pytest.fixture
def labels(tmp_path: Path) -> list[int]:
    labels = [number % 3 for number in range(300)]
    write_mnist(tmp_path / "data/mnist", labels)
    return labels


def run_partition(tmp_path: Path, *arguments: str | Path) -> CliResult:
    environment = {"FEDBUS_HOME": str(tmp_path / "home"), "FEDBUS_DATA_DIR": str(tmp_path / "data")}
    return run_fedbus(
        "data", "partition", *map(str, arguments), environment=environment | {"PATH": "/usr/bin:/bin"}
    )


def test_bars_show_the_classes_of_each_client(tmp_path: Path, labels: list[int]) -> None:
    shown = run_partition(tmp_path, "mnist", "--clients", "2", "--show")
    assert shown.code == ExitCode.OK, shown
    lines = shown.out.splitlines()
    assert lines[0].split(maxsplit=2)[2] == "mnist, 300 training samples, 3 classes"
    assert lines[1].split(maxsplit=1)[1] == "iid, 2 clients, seed 0"
    assert lines[2].split(maxsplit=3)[3] == "150"
    for client, line in enumerate(lines[-2:]):
        number, samples, classes, bar = line.split()
        assert (number, samples, classes, set(bar)) == (str(client), "150", "3", set("012"))


def test_many_clients_are_a_sample_and_histograms(tmp_path: Path, labels: list[int]) -> None:
    shown = run_partition(tmp_path, "mnist", "--clients", "200", "--show")
    assert "25 of 200 clients, from the smallest to the largest" in shown.out
    assert "1 to 2, median 2   ██" in shown.out
    assert len(shown.out.splitlines()) == 5 + 1 + 1 + 1 + 25


def test_json_has_the_counts(tmp_path: Path, labels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBUS_HOME", str(tmp_path / "home"))
    partition_labels(np.array(labels), "classes:1", 2, seed=5)  # the command finds it in the cache
    facts = run_partition(
        tmp_path, "mnist", "--clients", "2", "--partition", "classes:1", "--seed", "5", "--json"
    ).facts
    assert facts["counts"] == [[100, 0, 0], [0, 100, 0]]
    assert facts["unused"] == [0, 0, 100]
    assert facts["classes"] == ["0", "1", "2"]
    assert facts["skew"] == 0.5
    assert facts["sizes"] == {"min": 100, "median": 100, "max": 100}
    assert (facts["dataset"], facts["partition"], facts["clients"], facts["seed"]) == (
        "mnist",
        "classes:1",
        2,
        5,
    )
    text = run_partition(tmp_path, "mnist", "--clients", "2", "--partition", "classes:1", "--seed", "5").out
    assert "not used            100 samples of the classes 2: no client has these classes" in text


@pytest.mark.parametrize("clients", [3, 60])
def test_the_picture_is_written(tmp_path: Path, labels: list[int], clients: int) -> None:
    out = tmp_path / "labels.png"
    done = run_partition(tmp_path, "mnist", "--clients", str(clients), "--out", out)
    assert done.err.endswith(f"wrote {out}\n"), done
    with Image.open(out) as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["mnist", "--partition", "skewed"],
            ExitCode.USAGE,
            "'skewed' is unknown. Allowed",
        ),
        (["mnist", "--clients", "400"], ExitCode.USAGE, "Use at most 300 clients"),
        (["cifar-10"], ExitCode.NOT_FOUND, "'cifar-10' is not in"),
        (["mnist", "--data", "/nowhere"], ExitCode.NOT_FOUND, "the data folder /nowhere does not exist"),
        (["mnist", "--out", "labels.gif"], ExitCode.USAGE, "use a name that ends with .png, .svg, .pdf"),
        (["mnist", "--out", "/nowhere/labels.png"], ExitCode.MACHINE, "cannot write /nowhere/labels.png"),
        (["empty"], ExitCode.FAILED, "has no data set: fedbus reads"),
    ],
)
def test_errors_have_exit_codes(
    tmp_path: Path, labels: list[int], arguments: list[str], code: ExitCode, message: str
) -> None:
    (tmp_path / "data/empty").mkdir()
    done = run_partition(tmp_path, *arguments)
    assert (done.code, message in done.err) == (code, True), done.err
