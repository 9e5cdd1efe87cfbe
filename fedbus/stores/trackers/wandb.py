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
    """Holds one W&B run open, since a task has one run at a time. A restarted monitor resumes it by its id."""

    def __init__(self, context: TrackerContext) -> None:
        self._task = context.task
        self._directory: Path = context.directory
        self._run: Any = None

    def begin(self, run: TrackedRun) -> None:
        config = {
            **run.config,
            "trigger": run.trigger,
            "code_version": run.code_version,
            "trace_id": run.trace_id,
        }
        self._open_run(run.run).config.update(config, allow_val_change=True)

    def round(self, round: TrackedRound) -> None:
        self._open_run(round.run).log(flatten_metrics(round), step=round.step)

    def end(self, run: RunEnded) -> None:
        wandb_run = self._open_run(run.run)
        wandb_run.summary.update(
            {"state": run.state, "reason": run.reason, "model_version": run.model_version}
        )
        wandb_run.finish(exit_code=0 if run.state == "finished" else 1)
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
