"""Flower apps on a bus in memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any
from uuid import uuid4

import numpy as np

from fedbus.contracts.client import ClientJoined
from fedbus.contracts.run import RoundResult, RunPlan, Scalar
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning.flower.client_app_host import ClientAppHost
from fedbus.learning.flower.grid import MessengerGrid
from fedbus.learning.flower.server_app_host import ServerAppHost
from fedbus.learning.library import ClientJob, ServerJob
from fedbus.learning.memory_bus import MemoryBus, MemoryDevice
from fedbus.learning.messenger import BusMessenger
from fedbus.learning.weights import Arrays

TASK, RUN = "tiny", "tiny-1"


@dataclass
class MemoryFederation:
    """A messenger with its Grid, the devices, and the task that they run."""

    path: Path
    package: str
    bus: MemoryBus
    messenger: BusMessenger
    grid: MessengerGrid
    plan: RunPlan
    devices: dict[str, MemoryDevice] = field(default_factory=dict)
    rounds: list[tuple[RoundResult, Arrays]] = field(default_factory=list)

    def add(self, client: str, **node_config: Scalar) -> MemoryDevice:
        job = ClientJob(
            task=self.task({"lr": 1.0}), client=client, run=RUN, plan=self.plan, node_config=node_config
        )
        device = MemoryDevice(ClientAppHost(job), client, self.bus, self.messenger.deliver, node_config)
        self.devices[client] = device
        self.bus.subscribers[client] = device.receive
        self.messenger.deliver(ClientJoined(task=TASK, client=client, run=RUN))
        return device

    def task(self, run_config: dict[str, Scalar], **table: Any) -> Task:
        return Task(
            table=TaskTable.model_validate({"task": TASK, "model": "models:build", **table}),
            app={
                "serverapp": f"{self.package}.server_app:app",
                "clientapp": f"{self.package}.client_app:app",
            },
            run_config=run_config,
            code_version="v1",
            path=str(self.path),
        )

    async def run(
        self,
        model: Arrays,
        *,
        run_config: dict[str, Scalar] | None = None,
        first_round: int = 1,
        **table: Any,
    ) -> Arrays:
        """Run the ServerApp and return the final model, empty if it has none. `rounds` has the results.

        *table* are further keys of ``[tool.fedbus]``.
        """
        task = self.task({"num-server-rounds": 1, **(run_config or {})}, **table)
        job = ServerJob(task=task, run=RUN, plan=self.plan, model=model, first_round=first_round)
        on_round = lambda result, arrays: self.rounds.append((result, arrays))  # noqa: E731
        return await asyncio.to_thread(lambda: ServerAppHost(job).run(self.messenger, on_round)) or {}

    def advance_clock(self, seconds: float) -> None:
        """Let *seconds* pass on the clock of the messenger."""
        now = self.messenger._now
        self.messenger._now = lambda: now() + seconds  # type: ignore[method-assign]  # moves the clock
        self.messenger._on_timer()

    @property
    def results(self) -> list[RoundResult]:
        return [result for result, _ in self.rounds]


CLIENT_APP = """
    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        step = context.node_config["step"]
        arrays = {
            name: Array(np.asarray(array.numpy() + np.asarray(step, array.numpy().dtype)))
            for name, array in message.content["arrays"].items()
        }
        seen = context.state.get("seen") or ConfigRecord({"messages": 0})
        seen["messages"] += 1
        context.state["seen"] = seen
        metrics = {"loss": 1.0 / step, "num-examples": context.node_config["samples"], "seen": seen["messages"]}
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        weight = float(message.content["arrays"]["w"].numpy().mean())
        metrics = {"eval_acc": weight / 100, "loss": 10.0 - weight, "num-examples": 5}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
"""

QUERY_APP = """
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def query(message, context):
        return Message(message.content, reply_to=message)
"""

SERVER_APP = """
    import numpy as np
    from flwr.app import ArrayRecord, MetricRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import *

    app = ServerApp()

    @app.main()
    def main(grid, context):
        initial = ArrayRecord({{"w": _array(np.zeros((4, 3), np.float32)), "b": _array(np.zeros(2, np.float64))}})
        strategy = {strategy}
        result = strategy.start(
            grid=grid, initial_arrays=initial, num_rounds=context.run_config["num-server-rounds"],
            evaluate_fn={evaluate_fn},
        )
        rounds_seen.append(sorted(result.train_metrics_clientapp))

    rounds_seen = []

    def centralized(server_round, arrays):
        return MetricRecord({{"centralized_loss": 100.0 - server_round, "accuracy": 0.5}})

    def _array(a):
        from flwr.app import Array
        return Array(a)
"""


def initial_model() -> Arrays:
    return {"w": np.zeros((4, 3), np.float32), "b": np.zeros(2, np.float64)}


def render_server_app(strategy: str = "FedAvg()", evaluate_fn: str = "None") -> str:
    return dedent(SERVER_APP).format(strategy=strategy, evaluate_fn=evaluate_fn)


@asynccontextmanager
async def open_memory_federation(
    path: Path, *, server: str = "", client: str = "", lost_after_s: float = 60.0, **plan: Any
) -> AsyncIterator[MemoryFederation]:
    """Open a federation in memory. The task's package has a unique name, since modules are process-wide."""
    package = f"task_{uuid4().hex[:8]}"
    home = path / package
    home.mkdir()
    (home / "__init__.py").touch()
    (home / "server_app.py").write_text(server or render_server_app())
    (home / "client_app.py").write_text(dedent(client or CLIENT_APP))
    bus = MemoryBus()
    run_plan = RunPlan(**{"rounds": 2, "round_s": 60.0, "recruit_s": 60.0, **plan})
    messenger = BusMessenger(bus, task=TASK, run=RUN, plan=run_plan, lost_after_s=lost_after_s)
    federation = MemoryFederation(path, package, bus, messenger, MessengerGrid(messenger), run_plan)
    try:
        yield federation
    finally:
        messenger.close("the test is over")
        for device in federation.devices.values():
            await device.close()
