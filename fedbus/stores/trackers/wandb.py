"""Weights & Biases: one project per task, one W&B run per run. WANDB_API_KEY and WANDB_MODE configure it."""

from pathlib import Path
from typing import Any

import wandb

from fedbus.stores.trackers.interface import (
    RunEnded,
    TrackedRound,
    TrackedRun,
    TrackerContext,
    flatten_metrics,
)


class WandbTracker:
    """Keeps one W&B run open, as a task has one run at a time; it is resumed by its id."""

    def __init__(self, place: TrackerContext) -> None:
        self._task = place.task
        self._directory: Path = place.directory
        self._run: Any = None

    def begin(self, run: TrackedRun) -> None:
        config = {
            **run.config,
            "trigger": run.trigger,
            "code_version": run.code_version,
            "trace_id": run.trace_id,
        }
        self._open_run(run.run).config.update(config, allow_val_change=True)

    def round(self, seen: TrackedRound) -> None:
        self._open_run(seen.run).log(flatten_metrics(seen), step=seen.step)

    def end(self, run: RunEnded) -> None:
        opened = self._open_run(run.run)
        opened.summary.update({"state": run.state, "reason": run.reason, "model_version": run.model_version})
        opened.finish(exit_code=0 if run.state == "finished" else 1)
        self._run = None

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _open_run(self, run: str) -> Any:
        if self._run is None or self._run.id != run:
            self.close()
            self._run = wandb.init(
                project=f"fedbus-{self._task}",
                id=run,
                name=run,
                dir=str(self._directory),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        return self._run
