"""The trackers: each test reads back by the library itself what the tracker recorded."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support import eventually

from fedbus.stores.trackers.interface import (
    RunEnded,
    TrackedRound,
    TrackedRun,
    Tracker,
    TrackerContext,
    TrackerMissing,
    UnknownTracker,
    flatten_metrics,
    open_tracker,
    open_trackers,
)
from fedbus.stores.trackers.local import LocalTracker, read_rounds

NOON = datetime(2026, 3, 14, 12, 0, tzinfo=UTC)
TASK = "mnist"


def make_run(run: str) -> TrackedRun:
    return TrackedRun(run, TASK, NOON, "schedule", "a" * 40, {"lr": 0.1, "strategy": "fedavg"}, "4bf92f35")


def make_round(run: str, number: int, step: int, loss: float) -> TrackedRound:
    clients = {"c1": {"samples": 10.0, "train_s": 1.5}}
    metrics = {"loss": loss, "top-5 %/val": 0.75, "seconds": 2.0, "clients": 1.0}
    return TrackedRound(run, TASK, number, step, NOON, metrics, clients)


def make_run_end(run: str, step: int) -> RunEnded:
    return RunEnded(run, TASK, NOON, "finished", model_version=2, step=step)


def send_two_runs(tracker: Tracker) -> None:
    """Send two runs of two rounds; the step continues from the first run to the second."""
    for number, run in enumerate(("mnist-1", "mnist-2")):
        tracker.begin(make_run(run))
        for round_number in (1, 2):
            step = 2 * number + round_number
            tracker.round(make_round(run, round_number, step, 1.0 / step))
        tracker.end(make_run_end(run, step))
    tracker.close()


@pytest.fixture
def tracker_context(tmp_path: Path) -> TrackerContext:
    return TrackerContext(TASK, tmp_path / "training")


def test_each_metric_of_a_round_has_one_name() -> None:
    assert flatten_metrics(make_round("mnist-1", 1, 1, 0.5)) == {
        "loss": 0.5,
        "top-5 %/val": 0.75,
        "seconds": 2.0,
        "clients": 1.0,
        "clients/c1/samples": 10.0,
        "clients/c1/train_s": 1.5,
    }


def test_the_local_tracker_stores_all_rounds(tracker_context: TrackerContext) -> None:
    send_two_runs(open_tracker("local", tracker_context))
    rounds = read_rounds(tracker_context.directory, TASK)
    assert [row["step"] for row in rounds] == [1, 2, 3, 4]
    assert [row["loss"] for row in rounds] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert [row["run"] for row in rounds] == ["mnist-1", "mnist-1", "mnist-2", "mnist-2"]


def test_a_repeated_round_is_stored_once(tracker_context: TrackerContext) -> None:
    send_two_runs(open_tracker("local", tracker_context))
    send_two_runs(open_tracker("local", tracker_context))
    assert len(read_rounds(tracker_context.directory, TASK)) == 4


def test_deliveries_to_other_trackers_survive_a_restart(
    tracker_context: TrackerContext,
) -> None:
    LocalTracker(tracker_context).mark_delivered("wandb", "mnist-1", "round 1")
    restarted = LocalTracker(tracker_context)
    assert restarted.was_delivered("wandb", "mnist-1", "round 1")
    assert not restarted.was_delivered("wandb", "mnist-1", "round 2")
    assert not restarted.was_delivered("mlflow", "mnist-1", "round 1")


def test_a_corrupt_database_is_moved_and_recreated(tracker_context: TrackerContext) -> None:
    send_two_runs(open_tracker("local", tracker_context))
    file = tracker_context.directory / "training.db"
    file.write_bytes(b"not a database, but as long as one" * 100)
    with capture_logs() as lines:
        send_two_runs(open_tracker("local", tracker_context))
    assert [line["reason"] for line in lines] == ["file is not a database"]
    assert len(read_rounds(tracker_context.directory, TASK)) == 4
    assert file.with_name("training.db.damaged").read_bytes().startswith(b"not a database")


def test_without_a_database_there_are_no_rounds(tmp_path: Path) -> None:
    assert read_rounds(tmp_path, TASK) == []


def test_tensorboard_has_one_curve_over_all_runs(tracker_context: TrackerContext) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    send_two_runs(open_tracker("tensorboard", tracker_context))
    events = accumulator.EventAccumulator(str(tracker_context.directory / "tensorboard" / TASK))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
        (4, 0.25),
    ]
    assert [event.step for event in events.Scalars("clients/c1/train_s")] == [1, 2, 3, 4]
    assert [(event.step, event.value) for event in events.Scalars("model_version")] == [(2, 2.0), (4, 2.0)]


@pytest.fixture
def mlflow_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.mark.filterwarnings("ignore")  # MLflow's own warnings
def test_mlflow_has_each_run_with_its_metrics_and_status(
    tracker_context: TrackerContext, mlflow_installed: None
) -> None:
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    send_two_runs(open_tracker("mlflow", tracker_context))
    client = MlflowClient(tracking_uri=f"file://{tracker_context.directory / 'mlruns'}")
    experiment = client.get_experiment_by_name(f"fedbus/{TASK}")
    assert experiment is not None
    runs = sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.run_name)
    assert [run.info.run_name for run in runs] == ["mnist-1", "mnist-2"]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert runs[0].data.params["strategy"] == "fedavg"
    history = client.get_metric_history(runs[1].info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(3, pytest.approx(1 / 3)), (4, 0.25)]
    assert runs[1].data.metrics == {
        "loss": 0.25,
        "top-5 _.val": 0.75,
        "seconds": 2.0,
        "participants": 1.0,
        "clients/c1/samples": 10.0,
        "clients/c1/train_s": 1.5,
    }


@pytest.mark.filterwarnings("ignore")
def test_mlflow_accepts_a_round_with_many_metrics(
    tracker_context: TrackerContext, mlflow_installed: None
) -> None:
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    clients = {f"c{number}": {f"metric_{index}": 1.0 for index in range(12)} for number in range(100)}
    tracker = open_tracker("mlflow", tracker_context)
    tracker.begin(make_run("mnist-1"))
    tracker.round(TrackedRound("mnist-1", TASK, 1, 1, NOON, {"loss": 0.5}, clients))
    client = MlflowClient(tracking_uri=f"file://{tracker_context.directory / 'mlruns'}")
    experiment = client.get_experiment_by_name(f"fedbus/{TASK}")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert len(run.data.metrics) == 1 + 100 * 12


@pytest.mark.filterwarnings("ignore")
def test_mlflow_continues_a_run_after_a_restart(
    tracker_context: TrackerContext, mlflow_installed: None
) -> None:
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    first = open_tracker("mlflow", tracker_context)
    first.begin(make_run("mnist-1"))
    first.round(make_round("mnist-1", 1, 1, 0.5))
    open_tracker("mlflow", tracker_context).round(make_round("mnist-1", 2, 2, 0.25))
    client = MlflowClient(tracking_uri=f"file://{tracker_context.directory / 'mlruns'}")
    experiment = client.get_experiment_by_name(f"fedbus/{TASK}")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 2


@pytest.mark.filterwarnings("ignore")
async def test_wandb_writes_its_files_without_a_network(
    tracker_context: TrackerContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    tracker_context.directory.mkdir()
    send_two_runs(open_tracker("wandb", tracker_context))
    files = list((tracker_context.directory / "wandb").rglob("*.wandb"))
    assert sorted(path.stem for path in files) == ["run-mnist-1", "run-mnist-2"]
    await eventually(
        lambda: all(path.stat().st_size > 500 for path in files)
    )  # a separate process writes them


def test_an_unknown_tracker_is_rejected_with_the_installed_ones(
    tracker_context: TrackerContext,
) -> None:
    with pytest.raises(UnknownTracker, match=r"unknown tracker 'neptune'; installed: .*local"):
        open_tracker("neptune", tracker_context)


def test_a_missing_library_gives_install_advice(
    tracker_context: TrackerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.delitem(__import__("sys").modules, "fedbus.stores.trackers.wandb", raising=False)
    with pytest.raises(TrackerMissing, match=r"pip install 'fedbus\[wandb\]'"):
        open_tracker("wandb", tracker_context)


def test_a_tracker_that_fails_to_start_is_left_out(tracker_context: TrackerContext) -> None:
    tracker_context.directory.parent.mkdir(exist_ok=True)
    tracker_context.directory.write_text("a file where a directory should be")
    assert open_trackers(["local"], tracker_context) == {}
