"""A bus in memory that serialises messages and copies blobs, like the real bus."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any
from uuid import uuid4

import numpy as np

from fedbus.contracts.client import ClientJoined, RoundReply
from fedbus.contracts.envelope import pack, unpack
from fedbus.contracts.message import Message
from fedbus.contracts.model import BlobRef
from fedbus.contracts.run import RoundResult, RunPlan, Scalar
from fedbus.contracts.server import MessageContent, RoundMessage
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning import bus_protocol
from fedbus.learning.flower.client_app_host import ClientAppHost
from fedbus.learning.flower.grid import MessengerGrid
from fedbus.learning.flower.server_app_host import ServerAppHost
from fedbus.learning.library import ClientJob, ClientResponse, ClientSession, IncomingMessage, ServerJob
from fedbus.learning.messenger import BusMessenger
from fedbus.learning.payload import fetch_content
from fedbus.learning.weights import Arrays

TASK, RUN = "tiny", "tiny-1"


@dataclass
class MemoryOffer:
    ref: BlobRef
    blobs: "MemoryBlobs"

    def release(self) -> None:
        self.blobs.released += 1
        self.blobs.offers[self.ref.sha256] -= 1
        if not self.blobs.offers[self.ref.sha256]:
            del self.blobs.contents[self.ref.sha256]


@dataclass
class MemoryBlobs:
    contents: dict[str, bytes] = field(default_factory=dict)
    offers: Counter[str] = field(default_factory=Counter)
    """Open offers by digest; the same bytes may be offered twice."""
    offered: int = 0
    released: int = 0
    fetching: int = 0
    max_concurrent_fetches: int = 0
    fetched: int = 0
    stall_after: int = 1_000_000
    """The number of fetches that succeed; all later ones block."""

    async def offer(
        self, data: list[memoryview], *, receivers: int = 1, sha256: str | None = None
    ) -> MemoryOffer:
        content = b"".join(data)
        digest = hashlib.sha256(content).hexdigest()
        assert sha256 in {None, digest}
        self.contents[digest] = content
        self.offers[digest] += 1
        assert receivers > 0
        self.offered += 1
        ref = BlobRef(sha256=digest, size_bytes=len(content), chunk_bytes=1024**2, holder="memory")
        return MemoryOffer(ref, self)

    async def fetch(self, ref: BlobRef, *, timeout_s: float) -> memoryview:
        assert timeout_s > 0
        self.fetching += 1
        self.max_concurrent_fetches = max(self.max_concurrent_fetches, self.fetching)
        try:
            await asyncio.sleep(3600 if self.fetched >= self.stall_after else 0)
            if ref.sha256 not in self.contents:
                raise ConnectionError(f"no offer of {ref.sha256[:8]}")
            return memoryview(bytearray(self.contents[ref.sha256]))
        finally:
            self.fetching -= 1
            self.fetched += 1


@dataclass
class MemoryBus:
    blobs: MemoryBlobs = field(default_factory=MemoryBlobs)
    is_connected: bool = True
    published: list[Message] = field(default_factory=list)
    subscribers: dict[str, Callable[[RoundMessage], None]] = field(default_factory=dict)

    async def publish(self, message: Message, *, id: str | None = None) -> None:
        assert id
        received = type(message).model_validate(unpack(pack(message)))
        self.published.append(received)
        if isinstance(received, RoundMessage):
            self.subscribers[received.client](received)


@dataclass
class MemoryDevice:
    """A client: a session in a worker thread. A *silent* one receives messages and never replies."""

    session: ClientSession
    client: str
    bus: bus_protocol.BusProtocol
    deliver: Callable[[Any], object]
    node_config: dict[str, Scalar] = field(default_factory=dict)
    received_messages: list[RoundMessage] = field(default_factory=list)
    is_silent: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def receive(self, message: RoundMessage) -> None:
        self.received_messages.append(message)
        if not self.is_silent:
            self.tasks.add(asyncio.get_running_loop().create_task(self.answer(message)))

    async def answer(self, message: RoundMessage) -> None:
        data = await fetch_content(message.content, self.bus.blobs, timeout_s=5)
        incoming = IncomingMessage(
            message_id=message.message_id,
            kind=message.message_type,
            data=data,
            round=message.round,
            group_id=message.group_id,
            ttl_s=message.ttl_s,
            created_at=message.created_at,
            node_config=self.node_config,
        )
        loop = asyncio.get_running_loop()
        response = await loop.run_in_executor(self.thread, self.session.handle, incoming)
        content = None
        if response.payload is not None:
            content, _ = await response.payload.prepare(self.bus.blobs, receivers=1)
        reply = make_reply(message, response, content)
        self.deliver(RoundReply.model_validate(unpack(pack(reply))))

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await asyncio.to_thread(self.thread.shutdown)


def make_reply(message: RoundMessage, response: ClientResponse, content: MessageContent | None) -> RoundReply:
    """Build the event of *response*, as the training process does."""
    return RoundReply(
        task=message.task,
        client=message.client,
        run=message.run,
        round=message.round,
        message_id=uuid4().hex,
        reply_to=message.message_id,
        created_at=response.created_at,
        ttl_s=message.ttl_s if response.ttl_s is None else response.ttl_s,
        content=content,
        error_code=response.error.code if response.error else None,
        error_reason=response.error.reason if response.error else "",
        train_s=response.train_s or 0.0,
        figures=dict(response.metrics),
    )


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
    run_plan = RunPlan(**{"rounds": 2, "round_s": 20.0, "recruit_s": 5.0, **plan})
    messenger = BusMessenger(bus, task=TASK, run=RUN, plan=run_plan, lost_after_s=lost_after_s)
    federation = MemoryFederation(path, package, bus, messenger, MessengerGrid(messenger), run_plan)
    try:
        yield federation
    finally:
        messenger.close("the test is over")
        for device in federation.devices.values():
            await device.close()
