"""The process that builds a task's first model: ``python -m fedbus child init``.

Torch is loaded here and gone with the process. Its answer is the artifact, stored, as JSON; or, with exit
code 1, why there is none.
"""

import asyncio
import tempfile
from pathlib import Path

from fedbus.agents.common.child_process import exit_with_reason, write_answer
from fedbus.agents.common.process_orders import InitProcessConfig, read_process_config
from fedbus.contracts.model import Artifact
from fedbus.learning import weights
from fedbus.learning.flower import task_code
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import open_model_store


async def main(_: asyncio.Event) -> int:
    order = read_process_config(InitProcessConfig)
    store = open_model_store(order.store, order.task.id)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "first.safetensors"
        try:
            artifact = await asyncio.to_thread(_build, order, path)
            await store.put(path, artifact.sha256)
        except (task_code.BadTask, StoreError) as error:
            return exit_with_reason(str(error))
    write_answer(artifact.model_dump_json())
    return 0


def _build(order: InitProcessConfig, path: Path) -> Artifact:
    builder = task_code.load_function(Path(order.task.path), order.task.table.model)
    try:
        model = builder()
        return weights.save(weights.from_torch(model.state_dict()), path)
    except Exception as error:
        raise task_code.BadTask(
            f"{order.task.table.model} did not make a model: {task_code.format_error(error)}"
        ) from error
