"""Runs a case under Flower's simulation: `flwr run` without the process around it.

ServerApp, Grid, link state, message queues, contexts and the handling of errors are Flower's own. Ray, which only
calls the ClientApp in another process, takes seconds for each run; by default the ClientApp is called here, with
the message and the context pickled in both directions as Ray does. `test_ray_observes_the_same` shows that it makes no
difference.
"""

import logging
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from differential.cases import FlowerCase
from differential.recording import RECORD, Recording, describe, read
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import ClientAppException
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.serverapp import Grid, ServerApp
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.telemetry import EventType

RUN_ID = 7_000_000_001


class LocalBackend:
    """Flower's RayBackend without Ray: the ClientApp in this process, its messages and contexts by value."""

    num_workers = 4

    def __init__(self, config: object) -> None:
        self._app: ClientApp

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        self._app = app_fn()

    def is_worker_idle(self) -> bool:
        return True

    def terminate(self) -> None:
        pass

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        copies: tuple[Message, Context] = pickle.loads(pickle.dumps((message, context)))
        message, context = copies
        try:
            reply = self._app(message, context)
        except Exception as error:
            raise ClientAppException(str(error)) from error
        outcome: tuple[Message, Context] = pickle.loads(pickle.dumps((reply, context)))
        return outcome


class _WaitForNodes(ServerApp):
    """Starts a ServerApp when all nodes are registered, which in the simulation happens in another thread."""

    def __init__(self, app: ServerApp, nodes: int) -> None:
        super().__init__()
        self._app, self._nodes = app, nodes

    def __call__(self, grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < self._nodes:
            time.sleep(0.01)
        self._app(grid, context)


@contextmanager
def _simulation(*, with_ray: bool) -> Iterator[dict[int, int]]:
    """Replace Flower's backend unless *with_ray*. Yields the numbers of the nodes by their ids, once they have any."""
    backend, register = raybackend.RayBackend, vce_api._register_nodes
    numbers: dict[int, int] = {}

    def register_and_note(*args: Any, **options: Any) -> dict[int, int]:
        numbers.update(register(*args, **options))
        return numbers

    vce_api._register_nodes = register_and_note
    if not with_ray:
        raybackend.RayBackend = LocalBackend  # type: ignore[misc, assignment]
    try:
        yield numbers
    finally:
        raybackend.RayBackend = backend  # type: ignore[misc]
        vce_api._register_nodes = register


def run_under_flower(case: FlowerCase, directory: Path, *, with_ray: bool = False) -> Recording:
    """Run *case* and return what it observed. An error of the ServerApp is in ``outcome``."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    directory.mkdir(exist_ok=True)
    record = directory / "flower.jsonl"
    config: dict[str, Any] = {**case.config, RECORD: str(record)}
    _write_project(directory / "flower", config)
    app = case.build()
    run = Run.create_empty(RUN_ID)
    run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
    context = Context(RUN_ID, 1, node_config={}, state=RecordDict(), run_config=dict(config))
    outcome: Any = None
    with _simulation(with_ray=with_ray) as numbers:
        try:
            _run_simulation(
                num_supernodes=case.clients,
                exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
                client_app=app.client,
                server_app=_WaitForNodes(app.server, case.clients),
                server_app_context=context,
                backend_config={"client_resources": {"num_cpus": 0.5, "num_gpus": 0.0}},
                app_dir=str(directory / "flower"),
                is_app=True,
                run=run,
            )
        except Exception as error:  # noqa: BLE001 - any error is an outcome to compare
            outcome = describe(error)
    return read(record, numbers) | {"outcome": [outcome]}


def _write_project(path: Path, config: dict[str, Any]) -> None:
    """Write the pyproject.toml from which Flower reads the run config of the ClientApps."""
    path.mkdir(parents=True)
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for key, value in config.items()
    ]
    (path / "pyproject.toml").write_text(
        "\n".join(
            [
                '[project]\nname = "app"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "me"',
                '[tool.flwr.app.components]\nserverapp = "a:b"\nclientapp = "a:b"',
                "[tool.flwr.app.config]",
                *lines,
            ]
        )
    )
