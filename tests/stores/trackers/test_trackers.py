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


def make_run_begun(run: str) -> TrackedRun:
    return TrackedRun(run, TASK, NOON, "schedule", "a" * 40, {"lr": 0.1, "strategy": "fedavg"}, "4bf92f35")


def make_round_seen(run: str, number: int, step: int, loss: float) -> TrackedRound:
    clients = {"c1": {"samples": 10.0, "train_s": 1.5}}
    metrics = {"loss": loss, "top-5 %/val": 0.75, "seconds": 2.0, "clients": 1.0}
    return TrackedRound(run, TASK, number, step, NOON, metrics, clients)


def make_run_ended(run: str, step: int) -> RunEnded:
    return RunEnded(run, TASK, NOON, "finished", model_version=2, step=step)


def send_two_runs(tracker: Tracker) -> None:
    """Two rounds each; the second run goes on where the first one ended."""
    for number, run in enumerate(("mnist-1", "mnist-2")):
        tracker.begin(make_run_begun(run))
        for one in (1, 2):
            step = 2 * number + one
            tracker.round(make_round_seen(run, one, step, 1.0 / step))
        tracker.end(make_run_ended(run, step))
    tracker.close()


@pytest.fixture
def tracker_context(tmp_path: Path) -> TrackerContext:
    return TrackerContext(TASK, tmp_path / "training")


def test_a_rounds_figures_have_one_name_each() -> None:
    assert flatten_metrics(make_round_seen("mnist-1", 1, 1, 0.5)) == {
        "loss": 0.5,
        "top-5 %/val": 0.75,
        "seconds": 2.0,
        "clients": 1.0,
        "clients/c1/samples": 10.0,
        "clients/c1/train_s": 1.5,
    }


def test_the_local_one_keeps_the_curve_over_all_runs(tracker_context: TrackerContext) -> None:
    send_two_runs(open_tracker("local", tracker_context))
    rounds = read_rounds(tracker_context.directory, TASK)
    assert [one["step"] for one in rounds] == [1, 2, 3, 4]
    assert [one["loss"] for one in rounds] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert [one["run"] for one in rounds] == ["mnist-1", "mnist-1", "mnist-2", "mnist-2"]


def test_what_is_told_twice_is_kept_once(tracker_context: TrackerContext) -> None:
    send_two_runs(open_tracker("local", tracker_context))
    send_two_runs(open_tracker("local", tracker_context))
    assert len(read_rounds(tracker_context.directory, TASK)) == 4


def test_the_local_one_remembers_what_others_were_told_after_a_restart_too(
    tracker_context: TrackerContext,
) -> None:
    LocalTracker(tracker_context).mark_delivered("wandb", "mnist-1", "round 1")
    memory = LocalTracker(tracker_context)
    assert memory.was_delivered("wandb", "mnist-1", "round 1")
    assert not memory.was_delivered("wandb", "mnist-1", "round 2")
    assert not memory.was_delivered("mlflow", "mnist-1", "round 1")


def test_a_damaged_file_is_set_aside_and_begun_anew(tracker_context: TrackerContext) -> None:
    send_two_runs(open_tracker("local", tracker_context))
    file = tracker_context.directory / "training.db"
    file.write_bytes(b"no database at all, and long enough to be taken for one" * 100)
    with capture_logs() as said:
        send_two_runs(open_tracker("local", tracker_context))
    assert [line["reason"] for line in said] == ["file is not a database"]
    assert len(read_rounds(tracker_context.directory, TASK)) == 4
    assert file.with_name("training.db.damaged").read_bytes().startswith(b"no database at all")


def test_nothing_was_kept_where_nothing_was_ever_told(tmp_path: Path) -> None:
    assert read_rounds(tmp_path, TASK) == []


def test_tensorboard_shows_one_line_over_all_runs(tracker_context: TrackerContext) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    send_two_runs(open_tracker("tensorboard", tracker_context))
    shown = accumulator.EventAccumulator(str(tracker_context.directory / "tensorboard" / TASK))
    shown.Reload()
    assert [(one.step, one.value) for one in shown.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
        (4, 0.25),
    ]
    assert [one.step for one in shown.Scalars("clients/c1/train_s")] == [1, 2, 3, 4]
    assert [(one.step, one.value) for one in shown.Scalars("model_version")] == [(2, 2.0), (4, 2.0)]


@pytest.fixture
def mlflow_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.mark.filterwarnings("ignore")  # of MLflow's own making
def test_mlflow_has_a_run_for_each_with_its_figures_and_its_end(
    tracker_context: TrackerContext, mlflow_installed: None
) -> None:
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    send_two_runs(open_tracker("mlflow", tracker_context))
    client = MlflowClient(tracking_uri=f"file://{tracker_context.directory / 'mlruns'}")
    experiment = client.get_experiment_by_name(f"fedbus/{TASK}")
    assert experiment is not None
    runs = sorted(client.search_runs([experiment.experiment_id]), key=lambda one: one.info.run_name)
    assert [one.info.run_name for one in runs] == ["mnist-1", "mnist-2"]
    assert [one.info.status for one in runs] == ["FINISHED", "FINISHED"]
    assert runs[0].data.params["strategy"] == "fedavg"
    history = client.get_metric_history(runs[1].info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(3, pytest.approx(1 / 3)), (4, 0.25)]
    assert runs[1].data.metrics == {
        "loss": 0.25,
        "top-5 _.val": 0.75,
        "seconds": 2.0,
        "participants": 1.0,
        "clients/c1/samples": 10.0,
        "clients/c1/train_s": 1.5,
    }


@pytest.mark.filterwarnings("ignore")
def test_mlflow_takes_a_round_of_more_figures_than_it_takes_at_once(
    tracker_context: TrackerContext, mlflow_installed: None
) -> None:
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    clients = {f"c{number}": {f"figure_{one}": 1.0 for one in range(12)} for number in range(100)}
    tracker = open_tracker("mlflow", tracker_context)
    tracker.begin(make_run_begun("mnist-1"))
    tracker.round(TrackedRound("mnist-1", TASK, 1, 1, NOON, {"loss": 0.5}, clients))
    client = MlflowClient(tracking_uri=f"file://{tracker_context.directory / 'mlruns'}")
    experiment = client.get_experiment_by_name(f"fedbus/{TASK}")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert len(run.data.metrics) == 1 + 100 * 12


@pytest.mark.filterwarnings("ignore")
def test_mlflow_takes_a_run_up_again_after_a_restart(
    tracker_context: TrackerContext, mlflow_installed: None
) -> None:
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    first = open_tracker("mlflow", tracker_context)
    first.begin(make_run_begun("mnist-1"))
    first.round(make_round_seen("mnist-1", 1, 1, 0.5))
    open_tracker("mlflow", tracker_context).round(make_round_seen("mnist-1", 2, 2, 0.25))
    client = MlflowClient(tracking_uri=f"file://{tracker_context.directory / 'mlruns'}")
    experiment = client.get_experiment_by_name(f"fedbus/{TASK}")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 2


@pytest.mark.filterwarnings("ignore")
async def test_weights_and_biases_has_its_files_without_a_network(
    tracker_context: TrackerContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    tracker_context.directory.mkdir()
    send_two_runs(open_tracker("wandb", tracker_context))
    kept = list((tracker_context.directory / "wandb").rglob("*.wandb"))
    assert sorted(path.stem for path in kept) == ["run-mnist-1", "run-mnist-2"]
    await eventually(
        lambda: all(path.stat().st_size > 500 for path in kept)
    )  # a process of its own writes them


def test_a_tracker_that_nobody_installed_is_named_with_those_that_are(
    tracker_context: TrackerContext,
) -> None:
    with pytest.raises(UnknownTracker, match=r"unknown tracker 'neptune'; installed: .*local"):
        open_tracker("neptune", tracker_context)


def test_a_tracker_whose_library_is_missing_says_what_to_install(
    tracker_context: TrackerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.delitem(__import__("sys").modules, "fedbus.stores.trackers.wandb", raising=False)
    with pytest.raises(TrackerMissing, match=r"pip install 'fedbus\[wandb\]'"):
        open_tracker("wandb", tracker_context)


def test_a_tracker_that_does_not_begin_is_left_out(tracker_context: TrackerContext) -> None:
    tracker_context.directory.parent.mkdir(exist_ok=True)
    tracker_context.directory.write_text("a file where a directory should be")
    assert open_trackers(["local"], tracker_context) == {}
