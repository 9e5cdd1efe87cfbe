"""MLflow: one experiment per task, one MLflow run per run.

MLFLOW_TRACKING_URI names the server; without it, MLflow writes to a directory. There each metric is a file and a
slash in its name makes a folder, so no metric may have the name of a folder. Only the metrics of clients have a slash
(``clients/c1/train_s``), and the number of clients is ``participants``.
"""

import os
import re
from typing import Any, Final

import mlflow
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.tracking import MlflowClient

from fedbus.stores.trackers.interface import RunEnded, TrackedRound, TrackedRun, TrackerContext

TRACKING_URI_VARIABLE: Final = "MLFLOW_TRACKING_URI"
RUN_TAG: Final = "fedbus.run"
MAX_PARAM_CHARS: Final = 500
MAX_METRICS_PER_CALL: Final = 1000
"""The limit of MLflow."""
INVALID_NAME_CHARS: Final = re.compile(r"[^\w\-. :]", re.ASCII)
"""Characters that MLflow does not allow in a name, and the slash."""
_STATUS: Final = {"finished": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class MlflowTracker:
    """Finds a run by its tag, so that a restarted monitor continues it."""

    def __init__(self, context: TrackerContext) -> None:
        uri = os.environ.get(TRACKING_URI_VARIABLE) or f"file://{(context.directory / 'mlruns').absolute()}"
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a directory needs no server
        mlflow.set_tracking_uri(uri)
        self._client = MlflowClient(tracking_uri=uri)
        name = f"fedbus/{context.task}"
        experiment = self._client.get_experiment_by_name(name)
        self._experiment: str = (
            experiment.experiment_id if experiment else self._client.create_experiment(name)
        )
        self._ids: dict[str, str] = {}

    def begin(self, run: TrackedRun) -> None:
        params = {"trigger": run.trigger, "code_version": run.code_version, **run.config}
        self._client.log_batch(
            self._run_id(run.run),
            params=[
                Param(_metric_name(name), str(value)[:MAX_PARAM_CHARS]) for name, value in params.items()
            ],
            tags=[RunTag("fedbus.trace_id", run.trace_id)],
        )

    def round(self, round: TrackedRound) -> None:
        at_ms = int(round.at.timestamp() * 1000)
        metrics = [Metric(name, value, at_ms, round.step) for name, value in _to_metrics(round).items()]
        for begin in range(0, len(metrics), MAX_METRICS_PER_CALL):
            self._client.log_batch(
                self._run_id(round.run), metrics=metrics[begin : begin + MAX_METRICS_PER_CALL]
            )

    def end(self, run: RunEnded) -> None:
        tags = {
            "fedbus.model_version": run.model_version,
            "fedbus.promoted": run.promoted,
            "reason": run.reason,
        }
        self._client.log_batch(
            self._run_id(run.run),
            tags=[RunTag(name, str(value)) for name, value in tags.items() if value not in (None, "")],
        )
        status = RunStatus.from_string(_STATUS.get(run.state, "FAILED"))
        self._client.set_terminated(self._run_id(run.run), RunStatus.to_string(status))

    def close(self) -> None:
        """Do nothing: each call is complete when it returns."""

    def _run_id(self, run: str) -> str:
        if run not in self._ids:
            self._ids[run] = self._find_run(run) or self._create_run(run)
        return self._ids[run]

    def _find_run(self, run: str) -> str | None:
        runs: list[Any] = self._client.search_runs([self._experiment], f"tags.`{RUN_TAG}` = '{run}'")
        return str(runs[0].info.run_id) if runs else None

    def _create_run(self, run: str) -> str:
        created = self._client.create_run(self._experiment, tags={RUN_TAG: run}, run_name=run)
        return str(created.info.run_id)


def _to_metrics(round: TrackedRound) -> dict[str, float]:
    metrics = {_metric_name(name): value for name, value in round.metrics.items()}
    if (clients := metrics.pop("clients", None)) is not None:
        metrics["participants"] = clients
    by_client = {
        f"clients/{client}/{_metric_name(name)}": value
        for client, client_metrics in round.clients.items()
        for name, value in client_metrics.items()
    }
    return metrics | by_client


def _metric_name(name: str) -> str:
    return INVALID_NAME_CHARS.sub("_", name.replace("/", "."))
