"""Measure predictions while models change, and compare with a bare aiohttp handler that runs the same model.

    python -m benchmarks.serving              100,000 predictions during 60 swaps, both systems alternately
    python -m benchmarks.serving --help

The model is that of the MNIST example; a request is one sample of 784 numbers, as JSON. The server under test runs in a
separate process, with everything that a device has: checks, the queue, capture into SQLite. Each swap includes all
steps: the file is read and verified, the model is built, tested on probes and on the last captured inputs, and
replaces the previous one, which drains. *bare* is an aiohttp handler that reads the JSON, runs the model
and writes the JSON, without checks, batches and capture.

This process generates the load, over the given number of connections, with raw sockets and prepared requests, so that
it costs little. Both systems run alternately; the output is the median over the turns, and ratios.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web

from fedbus.agents.inference.event_queue import EventQueue
from fedbus.agents.inference.http_server import InferenceServer
from fedbus.agents.inference.model_swap import ModelSwap
from fedbus.agents.inference.offline_evaluation import OfflineEvaluation
from fedbus.app.demo.examples import mnist_path
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.model import ModelRef
from fedbus.contracts.task.task import Task
from fedbus.learning import weights
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.predictor import TaskPredictor
from fedbus.learning.task_model import first_arrays
from fedbus.stores.captured.store import CapturedData
from fedbus.stores.tasks.task_directory import read_task

PIXELS = 784
MODELS = 4
"""The number of model files, which are served one after the other."""


@dataclass
class Measurement:
    """The result of one turn."""

    answered: int = 0
    failed: int = 0
    seconds: float = 0.0
    swaps: int = 0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        return self.answered / self.seconds

    def latency_ms(self, share: float) -> float:
        return 1000 * float(np.quantile(self.latencies_s, share))


# --- the two servers, each in a separate process ------------------------------------------------


def load_task() -> Task:
    return read_task(mnist_path(), open_library)


def write_models(directory: Path, task: Task) -> list[tuple[ModelRef, Path]]:
    """Write different models of the task's architecture."""
    files = []
    for number in range(1, MODELS + 1):
        torch.manual_seed(number)
        path = directory / f"{number}.safetensors"
        artifact = weights.save(first_arrays(task) or {}, path)
        files.append((ModelRef(**artifact.model_dump(), version=number), path))
    return files


async def serve_fedbus(directory: Path) -> None:
    """Serve, and swap the model for each input line."""
    task = load_task()
    captured = CapturedData(directory / "captured.db", max_rows=20_000)
    server = InferenceServer(captured, name=task.id)
    probe = np.random.default_rng(0).random((8, PIXELS), dtype=np.float32)
    table = task.table
    phases = ModelSwap(
        server.engine,
        OfflineEvaluation(table.serving, table.capture, database=captured.path, probe=probe),
        table.serving,
        EventQueue().enqueue,
        task=task.id,
        client=client_id("bench"),
    )
    files = write_models(directory, task)
    await phases.serve_first(files[0][0], lambda: TaskPredictor(task, files[0][1]))
    print_line(await server.start())
    async for number in read_line_numbers():
        ref, path = files[number % MODELS]
        start = time.monotonic()
        await phases.replace(ref, lambda path=path: TaskPredictor(task, path))
        print_line(f"{time.monotonic() - start:.6f}")
    await server.stop()
    await captured.close()


async def serve_bare(directory: Path) -> None:
    """Run a minimal server that serves the same request with the same model."""
    task = load_task()
    predictor = TaskPredictor(task, write_models(directory, task)[0][1])

    async def predict(request: web.Request) -> web.Response:
        body = await request.json()
        outputs = predictor.predict(np.asarray(body["inputs"], np.float32))
        return web.json_response({"outputs": outputs.tolist()})

    application = web.Application()
    application.router.add_post("/predict", predict)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print_line(f"http://127.0.0.1:{runner.addresses[0][1]}")
    async for _ in read_line_numbers():
        pass
    await runner.cleanup()


def print_line(line: str) -> None:
    print(line, flush=True)


async def read_line_numbers() -> AsyncIterator[int]:
    """Yield the number of each line of standard input, until it ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    number = 0
    while await reader.readline():
        number += 1
        yield number


SERVERS = {"fedbus": serve_fedbus, "bare": serve_bare}


# --- the load, in this process -----------------------------------------------------------------------


class ServerUnderTest:
    """One of the servers, running."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port

    async def swap(self) -> float:
        """Swap the model, and return the duration in seconds."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(b"swap\n")
        return float(await self._process.stdout.readline())


@asynccontextmanager
async def run_server(system: str) -> AsyncIterator[ServerUnderTest]:
    with tempfile.TemporaryDirectory(prefix="fedbus-bench-") as directory:
        program = [sys.executable, "-m", "benchmarks.serving", "--serve", system, "--directory", directory]
        process = await asyncio.create_subprocess_exec(
            *program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdin
        assert process.stdout
        try:
            url = (await process.stdout.readline()).decode().strip()
            yield ServerUnderTest(process, int(url.rpartition(":")[2]))
        finally:
            process.stdin.close()
            await process.wait()


def make_request() -> bytes:
    """Build a request with one sample as JSON."""
    pixels = np.random.default_rng(7).integers(0, 256, PIXELS) / 255
    body = json.dumps({"inputs": [[round(float(pixel), 4) for pixel in pixels]]}).encode()
    header = (
        "POST /predict HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return header.encode() + body


async def send_requests(port: int, content: bytes, remaining: list[int], turn: Measurement) -> None:
    """Send requests on one connection until none remains."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while remaining[0] > 0:
        remaining[0] -= 1
        start = time.perf_counter()
        writer.write(content)
        header = await reader.readuntil(b"\r\n\r\n")
        length = int(header.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        turn.latencies_s.append(time.perf_counter() - start)
        if header.startswith(b"HTTP/1.1 200") and b"outputs" in body:
            turn.answered += 1
        else:
            turn.failed += 1
    writer.close()


async def run_load(
    server: ServerUnderTest, requests: int, connections: int, *, swaps: int = 0
) -> Measurement:
    """Send *requests* requests, with *swaps* swaps of the model spread over them."""
    turn, remaining, content = Measurement(), [requests], make_request()
    start = time.monotonic()
    swap_task = asyncio.create_task(keep_swapping(server, turn, requests, swaps))
    await asyncio.gather(*(send_requests(server.port, content, remaining, turn) for _ in range(connections)))
    turn.seconds = time.monotonic() - start
    if swaps:
        await swap_task
    swap_task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await swap_task
    return turn


async def keep_swapping(server: ServerUnderTest, turn: Measurement, requests: int, swaps: int) -> None:
    for number in range(swaps):
        while turn.answered + turn.failed < requests * number / swaps:  # noqa: ASYNC110 (a count, not an event)
            await asyncio.sleep(0.005)
        await server.swap()
        turn.swaps += 1


async def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run all turns, alternately."""
    turns: dict[str, list[Measurement]] = {"bare": [], "steady": [], "swaps": []}
    async with run_server("bare") as bare, run_server("fedbus") as fedbus:
        for server in (bare, fedbus):
            await run_load(server, 2000, options.connections)
        share = options.requests // options.turns
        for _ in range(options.turns):
            turns["bare"].append(await run_load(bare, share // 2, options.connections))
            turns["steady"].append(await run_load(fedbus, share // 2, options.connections))
            swaps = -(-options.swaps // options.turns)
            turns["swaps"].append(await run_load(fedbus, share, options.connections, swaps=swaps))
    return {name: summarize(measurements) for name, measurements in turns.items()}


def summarize(turns: list[Measurement]) -> dict[str, Any]:
    return {
        "answered": sum(turn.answered for turn in turns),
        "failed": sum(turn.failed for turn in turns),
        "swaps": sum(turn.swaps for turn in turns),
        "per_s": statistics.median(turn.requests_per_s for turn in turns),
        "p50_ms": statistics.median(turn.latency_ms(0.5) for turn in turns),
        "p99_ms": statistics.median(turn.latency_ms(0.99) for turn in turns),
    }


def print_results(results: dict[str, Any]) -> None:
    print(f"{'':<8}{'answered':>10}{'failed':>8}{'swaps':>7}{'per s':>9}{'p50 ms':>9}{'p99 ms':>9}")
    for name, result in results.items():
        print(
            f"{name:<8}{result['answered']:>10}{result['failed']:>8}{result['swaps']:>7}"
            f"{result['per_s']:>9.0f}{result['p50_ms']:>9.2f}{result['p99_ms']:>9.2f}"
        )
    steady, swaps, bare = results["steady"], results["swaps"], results["bare"]
    print(f"throughput: {steady['per_s'] / bare['per_s']:.0%} of the bare handler's (goal: at least 70 %)")
    print(f"p99 while models change: {swaps['p99_ms'] / steady['p99_ms']:.2f} × steady (goal: at most 2)")
    print(f"failed: {swaps['failed']} of {swaps['answered'] + swaps['failed']} (goal: 0)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--requests", type=int, default=100_000, help="requests while models change, in all turns together"
    )
    parser.add_argument("--swaps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(SERVERS[options.serve](options.directory))
        return
    results = asyncio.run(compare(options))
    print_results(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
