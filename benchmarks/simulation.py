"""Measure simulated rounds: fedbus beside plain torch processes, Apple's pfl, and Flower's own simulation.

    python -m benchmarks.simulation [--parts lenet noop start memory] [--clients 100 1000] [--rounds 5] [--json FILE]

    lenet     one SGD step of a LeNet (62,006 parameters) on 32 samples of 3 × 32 × 32, for each client
    noop      clients that return what they received
    start     from the start of a simulation to the end of its first round
    memory    no-op rounds of 1,000 and 10,000 clients: time, and memory of all processes

Each side runs in processes of its own. The sides run one round each in turn, so that load on the machine affects all of
them; a side waits without work while it is not its turn. The first round of each side is not counted. The output is the
median of the rounds and its ratio to fedbus. pfl and plain torch run one process for each worker, each with its
share of the clients. pfl is installed to build/pfl by `make bench-simulation`; without it, its side is left out.
"""

import argparse
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.rounds import SideFailed

ROOT: Final = Path(__file__).parents[1]
PFL: Final = ROOT / "build" / "pfl"
START_S: Final = 240.0
"""The limit for the start of a side."""
ROUND_S: Final = 300.0
"""The limit for one round."""
FLOWER_LENET_CLIENTS: Final = 100
"""Flower's simulation takes minutes for a round of more clients that train."""
PARTS: Final = ("lenet", "noop", "start", "memory")


@dataclass
class Side:
    """A running side, and what it measured."""

    name: str
    process: "subprocess.Popen[str]"
    log: Path
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    memory_mib: float = 0.0

    def read_line(self, limit_s: float) -> str:
        """Return the next answer. Raises SideFailed."""
        assert self.process.stdout is not None
        timer_fd = self.process.stdout
        line = _read_line(timer_fd, limit_s)
        if not line:
            raise SideFailed(f"{self.name} gave no answer within {limit_s:g} s: {_tail(self.log)}")
        return line

    def run_round(self, *, counts: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        seconds, cpu_s, memory = self.read_line(ROUND_S).split()
        if counts:
            self.seconds.append(float(seconds))
            self.cpu_s.append(float(cpu_s))
        self.memory_mib = max(self.memory_mib, float(memory))

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@contextmanager
def start_side(name: str, clients: int, workers: int) -> Iterator[Side]:
    """Start a side, and end it with all its processes."""
    log = ROOT / "build" / f"simulation-{name.replace(':', '-')}-{clients}.log"
    environment = {**os.environ, "PYTHONPATH": f"{PFL}:{ROOT}", "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.simulation_sides", name, str(clients), str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
    side = Side(name, process, log)
    try:
        side.read_line(START_S)
        yield side
    finally:
        with suppress(BrokenPipeError, OSError):
            assert process.stdin is not None
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure(names: Sequence[str], clients: int, workers: int, rounds: int, console: Console) -> list[Side]:
    """Run *rounds* rounds of each side in turn. A side that fails is left out."""
    with ExitStack() as stack:
        sides = []
        for name in names:
            try:
                sides.append(stack.enter_context(start_side(name, clients, workers)))
            except SideFailed as error:
                console.print(f"[yellow]{error}[/]")
        for number in range(rounds + 1):
            for side in sides[:]:
                try:
                    side.run_round(counts=number > 0)
                except SideFailed as error:
                    console.print(f"[yellow]{error}[/]")
                    sides.remove(side)
        return [side for side in sides if side.seconds]


def show(title: str, sides: list[Side], reference: str, console: Console) -> dict[str, Any]:
    """Print the medians and their ratios to the side *reference*, and return them."""
    by_name = {side.name: side for side in sides}
    base = by_name[reference].median_s if reference in by_name else None
    table = Table(
        "side", "median", "fastest", "CPU", "memory", f"÷ {reference}", title=title, title_justify="left"
    )
    result: dict[str, Any] = {}
    for side in sides:
        ratio = side.median_s / base if base else float("nan")
        table.add_row(
            side.name,
            f"{side.median_s * 1000:,.1f} ms",
            f"{min(side.seconds) * 1000:,.1f} ms",
            f"{statistics.median(side.cpu_s) * 1000:,.0f} ms",
            f"{side.memory_mib:,.0f} MiB",
            f"{ratio:.2f}",
        )
        result[side.name] = {
            "median_s": side.median_s,
            "rounds_s": side.seconds,
            "cpu_s": side.cpu_s,
            "memory_mib": side.memory_mib,
            "ratio": ratio,
        }
    console.print(table)
    return result


def measure_start(workers: int, repeats: int, console: Console) -> dict[str, Any]:
    """Measure the time from the start of a process to the end of the first round, of 100 clients that train."""
    times = {}
    for app in ("lenet_flower", "lenet_functions", "noop_flower"):
        own = []
        for _ in range(repeats):
            start = time.perf_counter()
            with start_side(f"fedbus:{app}", 100, workers):  # it is ready after its first round
                own.append(time.perf_counter() - start)
        times[app] = own
        console.print(f"start of the process to the end of round 1, {app}: {statistics.median(own):.2f} s")
    return times


def _read_line(stream: Any, limit_s: float) -> str:
    """Read a line within *limit_s*; an empty one if there is none."""
    ready, _, _ = select.select([stream], [], [], limit_s)
    return stream.readline() if ready else ""


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'its log is empty'} ({log})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--clients", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side that count")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--flower", action=argparse.BooleanOptionalAction, default=True, help="also Flower's own simulation"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    console.print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, "
                  f"{options.workers} workers, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    results: dict[str, Any] = {"workers": options.workers, "load": os.getloadavg()}
    pfl = ["pfl"] if PFL.is_dir() else []
    if "start" in options.parts:
        results["start"] = measure_start(options.workers, 3, console)
    for clients in options.clients if "lenet" in options.parts else ():
        names = ["fedbus:lenet_flower", "fedbus:lenet_functions", "torch", *pfl]
        if options.flower and clients <= FLOWER_LENET_CLIENTS:
            names.append("flower:lenet_flower")
        rounds = options.rounds if clients <= 100 else max(3, options.rounds // 2)
        sides = measure(names, clients, options.workers, rounds, console)
        results[f"lenet {clients}"] = show(
            f"LeNet, {clients:,} clients", sides, "fedbus:lenet_flower", console
        )
    for clients in options.clients if "noop" in options.parts else ():
        names = ["fedbus:noop_flower", *(["flower:noop_flower"] if options.flower else [])]
        rounds = options.rounds if clients <= 100 else 2
        sides = measure(names, clients, options.workers, rounds, console)
        results[f"noop {clients}"] = show(f"no-op, {clients:,} clients", sides, "fedbus:noop_flower", console)
    for clients in (1000, 10_000) if "memory" in options.parts else ():
        sides = measure(["fedbus:noop_flower"], clients, options.workers, options.rounds, console)
        results[f"memory {clients}"] = show(
            f"no-op, {clients:,} clients", sides, "fedbus:noop_flower", console
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
