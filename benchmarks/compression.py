"""Measure the bytes of compressed updates, and the accuracy that they cost.

    FEDBUS_DATA_DIR=../shared/data python -m benchmarks.compression [--clients 10] [--rounds 10] [--json FILE]

examples/mnist trains on a bus in memory, once for each encoding, from the same seed: each client has 600 images
with label skew. The bytes are those of the replies to training messages, which is what a client uploads on the fleet.
"""

import argparse
import asyncio
import json
import logging
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from rich import box
from rich.console import Console
from rich.table import Table

from fedbus.contracts.client import ClientJoined
from fedbus.contracts.run import RoundResult, RunPlan, Scalar
from fedbus.contracts.task.compression import CompressionTable
from fedbus.contracts.task.task import Task
from fedbus.learning.compression import apply_update, encode_update, make_encoding
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import ClientJob, ClientResponse, ClientSession, IncomingMessage, ServerJob
from fedbus.learning.memory_bus import MemoryBus, MemoryDevice
from fedbus.learning.messenger import BusMessenger
from fedbus.learning.seeding import seed_client, seed_server
from fedbus.learning.weights import Arrays
from fedbus.stores.tasks.task_directory import read_task

APP: Final = Path(__file__).parents[1] / "examples" / "mnist"
RUN: Final = "compression"
CONFIG: Final[dict[str, Scalar]] = {
    "max-samples": 600,
    "alpha": 0.5,
    "local-epochs": 1,
    "fraction-evaluate": 0.0,
}
ENCODINGS: Final[dict[str, dict[str, Any]]] = {
    "float32": {},
    "bf16": {"method": "bf16"},
    "int8": {"method": "int8"},
    "int8, no error feedback": {"method": "int8", "error-feedback": False},
    "top-k, share 0.1": {"method": "top-k", "share": 0.1},
    "top-k, share 0.01": {"method": "top-k"},
    "top-k, share 0.01, no error feedback": {"method": "top-k", "error-feedback": False},
}
COST_REPEATS: Final = 20


@dataclass
class Outcome:
    """The outcome of one run."""

    bytes_per_update: list[int] = field(default_factory=list)
    rounds: list[RoundResult] = field(default_factory=list)
    model: Arrays = field(default_factory=dict)

    def accuracy(self) -> list[float]:
        return [result.metrics["accuracy"] for result in self.rounds if "accuracy" in result.metrics]


@dataclass
class MeasuredSession:
    """A session that counts the bytes of its updates. It seeds the generators as the process of a client does."""

    session: ClientSession
    job: ClientJob
    outcome: Outcome
    lock: threading.Lock

    def handle(self, message: IncomingMessage) -> ClientResponse:
        with self.lock, _own_numpy_state():
            seed_client(
                self.job.plan.seed, client=self.job.client, round_number=message.round, kind=message.kind
            )
            response = self.session.handle(message)
        if response.error is not None:
            raise RuntimeError(f"{self.job.client}: {response.error.reason}")
        if message.kind == "train" and response.payload is not None:
            self.outcome.bytes_per_update.append(response.payload.size_bytes)
        return response

    def close(self) -> None:
        self.session.close()


async def run(task: Task, *, clients: int, rounds: int, seed: int) -> Outcome:
    """Train *task* on a bus in memory."""
    library, bus, outcome = open_library(task.table.library), MemoryBus(), Outcome()
    plan = RunPlan(rounds=rounds, round_s=600.0, recruit_s=60.0, seed=seed, deterministic=True, config=CONFIG)
    messenger = BusMessenger(bus, task=task.id, run=RUN, plan=plan, lost_after_s=600.0)
    devices, lock = [], threading.Lock()
    for number in range(clients):
        client = f"client-{number:04}"
        config: dict[str, Scalar] = {"partition-id": number, "num-partitions": clients}
        job = ClientJob(task=task, client=client, run=RUN, plan=plan, node_config=config)
        session = MeasuredSession(library.open_client(job), job, outcome, lock)
        device = MemoryDevice(session, client, bus, messenger.deliver, config)
        bus.subscribers[client] = device.receive
        devices.append(device)
        messenger.deliver(ClientJoined(task=task.id, client=client, run=RUN))
    seed_server(seed)
    server = library.open_server(ServerJob(task=task, run=RUN, plan=plan, model={}))
    try:
        final = await asyncio.to_thread(server.run, messenger, lambda one, _: outcome.rounds.append(one))
    finally:
        messenger.close("the run is over")
        for device in devices:
            await device.close()
    outcome.model = final or {}
    return outcome


def cost_ms(table: CompressionTable, model: Arrays) -> float | None:
    """Return the median time to encode and decode one update of *model*, in milliseconds."""
    encoding = make_encoding(table)
    if encoding is None:
        return None
    random = np.random.default_rng(1)
    pairs = [
        (array, (array + random.normal(0, 0.01, array.shape)).astype(array.dtype)) for array in model.values()
    ]
    seconds = []
    for _ in range(COST_REPEATS):
        start = time.perf_counter()
        for array, trained in pairs:
            data = encode_update(encoding, trained, array).data
            apply_update(encoding.name, data, array)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


@contextmanager
def _own_numpy_state() -> Iterator[None]:
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


def measure(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    task = read_task(APP, open_library)
    rows: list[dict[str, Any]] = []
    for name, values in ENCODINGS.items():
        compression = CompressionTable.model_validate(values)
        table = task.table.model_copy(update={"compression": compression})
        start = time.monotonic()
        outcome = asyncio.run(
            run(
                task.model_copy(update={"table": table}),
                clients=options.clients,
                rounds=options.rounds,
                seed=options.seed,
            )
        )
        size = statistics.mean(outcome.bytes_per_update)
        rows.append(
            {
                "encoding": name,
                "bytes_per_update": size,
                "bytes_per_round": size * options.clients,
                "ratio": size / (rows[0]["bytes_per_update"] if rows else size),
                "accuracy": outcome.accuracy(),
                "cost_ms": cost_ms(compression, outcome.model),
            }
        )
        console.print(f"{name}: {time.monotonic() - start:.1f} s", highlight=False)
    return rows


def format_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    table = Table(
        box=box.SIMPLE,
        title=f"examples/mnist, {options.clients} clients, {options.rounds} rounds, seed {options.seed}",
    )
    for column in ("encoding", "KB up a round", "of float32", "accuracy at the end", "encode + decode"):
        table.add_column(column, justify="left" if column == "encoding" else "right")
    for row in rows:
        cost = "–" if row["cost_ms"] is None else f"{row['cost_ms']:.1f} ms"
        table.add_row(
            row["encoding"],
            f"{row['bytes_per_round'] / 1000:,.0f}",
            f"{row['ratio']:.3f}",
            f"{row['accuracy'][-1]:.3f}",
            cost,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    console = Console()
    rows = measure(options, console)
    console.print(format_table(rows, options))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
