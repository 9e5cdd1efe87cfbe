"""The process that builds a task's first model: ``python -m fedbus.app.child init``.

Torch is loaded here and gone with the process. Its answer is the artifact, stored, as JSON; or, with exit
code 1, why there is none.
"""

import asyncio
import tempfile
from pathlib import Path

from fedbus.agents.child import answer, given_up
from fedbus.agents.launch import InitOrder, order_of_this_process
from fedbus.contracts.model import Artifact
from fedbus.learning import apps, weights
from fedbus.stores.errors import StoreError
from fedbus.stores.models import open_store


async def main(_: asyncio.Event) -> int:
    order = order_of_this_process(InitOrder)
    store = open_store(order.store, order.task.id)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "first.safetensors"
        try:
            artifact = await asyncio.to_thread(_build, order, path)
            await store.put(path, artifact.sha256)
        except (apps.BadTask, StoreError) as error:
            return given_up(str(error))
    answer(artifact.model_dump_json())
    return 0


def _build(order: InitOrder, path: Path) -> Artifact:
    builder = apps.load_function(Path(order.task.path), order.task.table.model)
    try:
        model = builder()
        return weights.save(weights.from_torch(model.state_dict()), path)
    except Exception as error:
        raise apps.BadTask(
            f"{order.task.table.model} did not make a model: {apps.one_line(error)}"
        ) from error
