"""The reports of the experiments heterogeneity, devices and continual."""

import json
from pathlib import Path

import pytest
from support.data_files import write_mnist
from support.experiment_records import make_rounds, record_of

from fedbus.simulation.experiments.continual import ContinualExperiment
from fedbus.simulation.experiments.cpu_limits import LimitsUnavailable, assign_cores, find_parent
from fedbus.simulation.experiments.devices import DevicesExperiment
from fedbus.simulation.experiments.errors import ExperimentDataMissing, InvalidExperiment
from fedbus.simulation.experiments.heterogeneity import HeterogeneityExperiment
from fedbus.simulation.experiments.report import ReportContext, write_report


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDBUS_HOME", str(tmp_path / "home"))
    write_mnist(tmp_path / "data/mnist", [0, 1, 2], size=28)
    return tmp_path / "data"


# --- heterogeneity ----------------------------------------------------------------------------


def test_absent_data_sets_are_skipped_with_a_line(data_dir: Path) -> None:
    experiment = HeterogeneityExperiment([1], data_dir)
    assert [one.title for one in experiment.found.present] == ["MNIST"]
    fashion, cifar = experiment.found.skipped
    assert fashion.startswith("Fashion-MNIST is skipped: the data set 'fashion-mnist' is not in")
    assert cifar.startswith("CIFAR-10 is skipped: the data set 'cifar-10' is not in")
    cells = experiment.plan([])
    assert len(cells) == 6 * 4
    assert cells[-1].settings["partition"] == "classes:2+sizes:linear"


def test_the_table_has_local_and_global_accuracy(data_dir: Path, tmp_path: Path) -> None:
    experiment = HeterogeneityExperiment([1, 2], data_dir, algorithms=["FedAvg", "SCAFFOLD"])
    records = []
    for cell in experiment.plan([]):
        accuracy = 0.9 - 0.3 * (cell.factors["partition"] == "skew 1")
        accuracy += 0.1 * (cell.factors["algorithm"] == "SCAFFOLD") * (cell.factors["partition"] == "skew 1")
        records.append(record_of(cell, make_rounds([0.1, accuracy], local=[None, 0.5])))
    report = experiment.report(records)
    table, gains = report.tables
    assert table.headings == ["data", "FedAvg local", "FedAvg global", "SCAFFOLD local", "SCAFFOLD global"]
    assert table.rows[0] == ["IID", "50.0 ± 0.0", "90.0 ± 0.0", "50.0 ± 0.0", "90.0 ± 0.0"]
    assert gains.rows[4] == ["skew 1", "+10.0"]
    texts = [finding.text for finding in report.findings]
    assert texts[0] == (
        "MNIST: the global model of FedAvg has 90.0% with IID data and 60.0% with skew 1 data"
    )
    assert texts[1] == "MNIST: the largest gain over FedAvg is +10.0 points, by SCAFFOLD with skew 1 data"
    write_report(report, records, ReportContext("fedbus", [1, 2], 1), tmp_path)
    assert (tmp_path / "accuracy-mnist.png").exists()


def test_unknown_and_damaged_data_sets_are_errors(data_dir: Path) -> None:
    with pytest.raises(InvalidExperiment, match="unknown data set 'imagenet'"):
        HeterogeneityExperiment([1], data_dir, datasets=["imagenet"]).plan([])
    (data_dir / "mnist/train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(ExperimentDataMissing, match=r"train-images-idx3-ubyte\.gz is truncated or damaged"):
        HeterogeneityExperiment([1], data_dir).plan([])


# --- devices ----------------------------------------------------------------------------------


def test_devices_are_slowed_by_a_profile(data_dir: Path, tmp_path: Path) -> None:
    experiment = DevicesExperiment([1], data_dir, use_profile=True)
    cells = {str(cell.factors["devices"]): cell for cell in experiment.plan([])}
    assert list(cells) == ["fast", "medium", "slow", "together"]
    groups = cells["together"].settings["profile"]["groups"]
    assert groups["slow"] == {"clients": ["client-0002"], "training": {"slowdown": 4.0}}
    times = {"fast": (1, 1, 1), "medium": (2, 2, 2), "slow": (4, 4, 4), "together": (1, 2, 4)}
    records = [
        record_of(cell, make_rounds([0.1, 0.5, 0.6, 0.7], round_s=max(times[name]), train_s=times[name]))
        for name, cell in cells.items()
    ]
    report = experiment.report(records)
    assert "CPU time is not limited: --profile was chosen" in report.setting[1]
    assert report.tables[0].rows[3] == ["together", "100% / 50% / 25%", "4.00", "2.33", "12.0", "70.0%"]
    assert report.tables[1].rows[0] == ["fast", "100%", "1.00", "3.00"]
    assert "4.0 times that of the fast devices, 1.00 times that of the slow ones" in report.findings[0].text
    write_report(report, records, ReportContext("fedbus", [1], 1), tmp_path)


def test_each_client_has_a_limit_of_its_own(data_dir: Path) -> None:
    experiment = DevicesExperiment([1], data_dir)
    experiment.__dict__["obstacle"] = None  # the cached property: the CPU time is limited
    shares = {str(cell.factors["devices"]): cell.settings["shares"] for cell in experiment.plan([])}
    assert shares["slow"] == [0.25, 0.25, 0.25]
    assert shares["together"] == [1.0, 0.5, 0.25]


def test_a_busy_machine_is_named(data_dir: Path) -> None:
    experiment = DevicesExperiment([1], data_dir)
    experiment.__dict__["obstacle"] = None  # the cached property: the CPU time is limited
    records = [
        record_of(
            cell,
            {**make_rounds([0.1, 0.5, 0.6]), "cgroup_version": 2, "is_pinned": True, "load": 8.0, "cores": 2},
        )
        for cell in experiment.plan([])
    ]
    how = experiment.report(records).setting[1]
    assert how.startswith(
        "CPU time limited on this machine by cgroups (version 2); the clock is real. Each client"
    )
    assert how.count("The machine was busy (load 8 on 2 cores)") == 1


def test_each_client_gets_a_core_on_which_its_share_fits() -> None:
    assert assign_cores([1.0, 0.5, 0.25], [4, 7]) == [4, 7, 7]
    assert assign_cores([0.25, 0.25, 0.25], [4]) == [4, 4, 4]
    assert assign_cores([1.0, 1.0, 1.0], [4, 7]) is None


def test_devices_that_do_not_get_their_share_are_named(data_dir: Path) -> None:
    experiment = DevicesExperiment([1], data_dir)
    experiment.__dict__["obstacle"] = None  # the cached property: the CPU time is limited
    records = [
        record_of(
            cell,
            {**make_rounds([0.1, 0.5, 0.6]), "is_pinned": cell.factors["devices"] != "fast", "cores": 2},
        )
        for cell in experiment.plan([])
    ]
    how = experiment.report(records).setting[1]
    assert "Each client trains on one core (CPU affinity)" in how
    assert "but not those of fast: together they need more than the 2 cores" in how


def test_cgroups_are_found_in_both_versions(tmp_path: Path) -> None:
    with pytest.raises(LimitsUnavailable, match="no cgroups"):
        find_parent(tmp_path)
    (tmp_path / "cgroup.controllers").write_text("memory pids")
    with pytest.raises(LimitsUnavailable, match="the CPU controller of cgroups is not available"):
        find_parent(tmp_path)
    (tmp_path / "cgroup.controllers").write_text("cpu memory")
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory")
    assert find_parent(tmp_path) == (tmp_path, 2)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cgroup.procs").touch()
    assert find_parent(tmp_path) == (tmp_path / "cpu", 1)


# --- continual --------------------------------------------------------------------------------


def test_runs_must_continue_where_the_last_one_ended(data_dir: Path, tmp_path: Path) -> None:
    experiment = ContinualExperiment([1], data_dir)
    [cell] = experiment.plan([])
    losses = [0.9 - 0.05 * number for number in range(21)]
    runs = [make_rounds([1 - loss for loss in losses[4 * run : 4 * run + 5]]) for run in range(5)]
    record = record_of(cell, {"runs": runs})
    report = experiment.report([record])
    assert [finding.is_met for finding in report.findings] == [True, True]
    assert report.tables[0].rows[1][1] == "0.7000"
    write_report(report, [record], ReportContext("fedbus", [1], 1), tmp_path)

    broken = json.loads(json.dumps(runs))
    broken[2]["rounds"][0]["loss"] = 2.0
    assert experiment.report([record_of(cell, {"runs": broken})]).findings[0].is_met is False
