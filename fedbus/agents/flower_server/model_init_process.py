"""The process that builds a task's initial model: ``python -m fedbus child init``.

A task without a builder gets an empty model. The process runs the task's code, whose memory is released when it ends.
Its answer is the stored artifact as JSON, or, with exit code 1, the reason for the failure.
"""

import asyncio
import tempfile
from pathlib import Path

from fedbus.agents.common.child_process import exit_with_reason, write_answer
from fedbus.agents.common.main_thread import MainThread
from fedbus.agents.common.process_orders import InitProcessConfig, read_process_config
from fedbus.contracts.model import Artifact
from fedbus.contracts.task.app import LibraryUnusable
from fedbus.learning import task_code, weights
from fedbus.learning.task_model import first_arrays
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import open_model_store


async def main(_: asyncio.Event, main_thread: MainThread) -> int:
    """Build the model, store it, and return the exit code."""
    config = read_process_config(InitProcessConfig)
    store = open_model_store(config.store, config.task.id)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "first.safetensors"
        try:
            artifact = await main_thread.run(_build, config, path)
            await store.put(path, artifact.sha256)
        except (task_code.BadTask, LibraryUnusable, StoreError) as error:
            return exit_with_reason(str(error))
    write_answer(artifact.model_dump_json())
    return 0


def _build(config: InitProcessConfig, path: Path) -> Artifact:
    try:
        return weights.save(first_arrays(config.task) or {}, path)
    except weights.BadWeights as error:
        raise task_code.BadTask(
            f"the model of {config.task.table.model} cannot be stored: {error}"
        ) from error
