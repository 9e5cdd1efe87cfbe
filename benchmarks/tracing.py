"""Measure the cost of traces and log lines: rounds with and without them, alternately.

    python -m benchmarks.tracing [--case 2x0.25] [--turns 20] [--turn 150] [--cold 5] [--products 0] [--same]
                                 [--json FILE]

*Default*: spans are created and stored in FEDBUS_HOME/traces, log lines are written at level info. *Without*:
OpenTelemetry's SDK is disabled and nothing is logged. Two federations run at the same time, one with each
configuration. They run alternately for some seconds (a turn): while one runs, the other blocks in its ServerApp. So
a change of the machine's speed affects both, and the start of the processes is not measured. The output is the
median ratio over the pairs of turns with its 95 % interval (bootstrap), for the duration of a round and for the CPU
time of all processes of a federation. With ``--same`` both federations have default settings: the output is the
error of the measurement. With ``--products`` each client multiplies that many matrices in a round instead of
training.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from benchmarks import on_fedbus
from benchmarks.rounds import Case, SideFailed, load_average, parse_case, read_stamps
from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.app import telemetry
from fedbus.app.entrypoints.signals import stop_on_signals

BOUND: Final = 1.03
POLL_S: Final = 0.05
START_S: Final = 120.0
PIPE: Final = "turns"
ROUND: Final = "round"
DEFAULT_SIDE: Final = "default"
SIDES: Final[Mapping[str, Mapping[str, str]]] = {
    DEFAULT_SIDE: {},
    "without": {"OTEL_SDK_DISABLED": "true", "FEDBUS_LOG_LEVEL": "critical"},
}


@dataclass
class BenchmarkSide:
    """One federation, and the results of its turns: seconds of a round, wall-clock and CPU."""

    name: str
    home: Path
    cold: int
    """Rounds at the start of a turn that are not measured, because the caches contain the other federation's data."""
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    async def take_turn(self, rounds: range) -> None:
        """Run *rounds*, and record their duration."""
        cpu_before_s = self._cpu_s()
        await self._open_pipe()
        while len(read_stamps(self._stamps)) <= rounds.stop:  # noqa: ASYNC110  # the app has no notification
            await asyncio.sleep(POLL_S)
        self.cpu.append((self._cpu_s() - cpu_before_s) / len(rounds))
        times = read_stamps(self._stamps)[rounds.start : rounds.stop + 1]
        steady = [end - start for start, end in itertools.pairwise(times)][self.cold :]
        self.seconds.append(statistics.median(steady))

    async def wait_until_ready(self) -> None:
        """Wait until the run of this federation has started and blocks before its first turn."""
        async with asyncio.timeout(START_S):
            while not read_stamps(self._stamps):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)

    async def _open_pipe(self) -> None:
        """Open and close the pipe that the ServerApp reads, so that it continues."""
        while True:
            with contextlib.suppress(OSError):  # ENXIO: the ServerApp does not read the pipe yet
                os.close(os.open(self.home / PIPE, os.O_WRONLY | os.O_NONBLOCK))
                return
            await asyncio.sleep(POLL_S)

    @property
    def _stamps(self) -> Path:
        return self.home / on_fedbus.STAMPS

    def _cpu_s(self) -> float:
        """Return the CPU time of all processes of this federation so far, in seconds."""
        total = 0.0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if str(self.home) in " ".join([*process.cmdline(), process.environ().get("FEDBUS_HOME", "")]):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total


@dataclass(frozen=True)
class PairedRatio:
    """The ratios of the two sides, for each pair of turns."""

    pairs: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.pairs)

    def confidence_interval(self, draws: int = 4000) -> tuple[float, float]:
        """Return the 95 % interval of the median (percentile bootstrap; Efron 1979)."""
        generator = random.Random(1)
        medians = sorted(
            statistics.median(generator.choices(self.pairs, k=len(self.pairs))) for _ in range(draws)
        )
        return medians[int(0.025 * draws)], medians[int(0.975 * draws)]

    def __str__(self) -> str:
        low, high = self.confidence_interval()
        return f"{self.median:.3f} × ({low:.3f} to {high:.3f})"


@contextmanager
def set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables that every process inherits that starts in the block."""
    previous = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(previous)


@asynccontextmanager
async def run_side(side: BenchmarkSide, case: Case, options: argparse.Namespace) -> AsyncIterator[None]:
    """Run its federation, ready for the first turn."""
    os.mkfifo(side.home / PIPE)
    turns = {
        "NOOP_TURNS": str(side.home / PIPE),
        "NOOP_TURN": str(options.turn),
        "NOOP_PRODUCTS": str(options.products),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    async with AsyncExitStack() as stack:
        with set_environment(turns | dict({} if options.same else SIDES[side.name])):
            await stack.enter_async_context(
                on_fedbus.start_run(case, options.turns * options.turn, side.home)
            )
            await side.wait_until_ready()
        yield


async def measure(case: Case, options: argparse.Namespace) -> list[BenchmarkSide]:
    """Run all turns of both federations."""
    with tempfile.TemporaryDirectory(prefix="fedbus-tracing-", ignore_cleanup_errors=True) as directory:
        sides = [
            BenchmarkSide(name, Path(directory) / name.replace(" ", "-"), options.cold) for name in SIDES
        ]
        for side in sides:
            side.home.mkdir()
        async with run_side(sides[0], case, options), run_side(sides[1], case, options):
            for turn in range(options.turns):
                for side in sides[:: 1 if turn % 2 else -1]:
                    await side.take_turn(range(turn * options.turn, (turn + 1) * options.turn))
                text = "   ".join(
                    f"{side.name} {side.seconds[-1] * 1000:6.2f} ms, {side.cpu[-1] * 1000:6.2f} ms CPU"
                    for side in sides
                )
                print(f"{turn + 1:3}/{options.turns}  {case}  {text}  load {load_average():.1f}", flush=True)
    return sides


def summarize(sides: Sequence[BenchmarkSide]) -> dict[str, PairedRatio]:
    """Return the ratios of wall-clock and CPU time."""
    default, without = sides
    return {
        ROUND: PairedRatio(_ratios(default.seconds, without.seconds)),
        "CPU time": PairedRatio(_ratios(default.cpu, without.cpu)),
    }


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


async def _run_until_signal(options: argparse.Namespace) -> dict[str, list[BenchmarkSide]]:
    results: dict[str, list[BenchmarkSide]] = {}

    async def measure_all() -> None:
        for case in options.case:
            results[str(case)] = await measure(case, options)

    with stop_on_signals() as stop:
        await wait_for_first(measure_all(), stop.wait())
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=parse_case, nargs="+", default=[Case(2, 0.25)], metavar="NxMIB")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--turn", type=int, default=150, help="rounds in each turn")
    parser.add_argument(
        "--cold", type=int, default=5, help="rounds at the start of each turn that are not measured"
    )
    parser.add_argument(
        "--products", type=int, default=0, help="products of 256 × 256 matrices by each client in a round"
    )
    parser.add_argument(
        "--same", action="store_true", help="both with default settings: the measurement error"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    telemetry.log_to_stderr(level="ERROR")
    results: dict[str, list[BenchmarkSide]] = {}
    has_failed = False
    try:
        results = asyncio.run(_run_until_signal(options))
    except* SideFailed as group:
        has_failed = True
        print(*group.exceptions, sep="\n", file=sys.stderr)
    if has_failed:
        return 1
    ratios = {case: summarize(sides) for case, sides in results.items()}
    for case, by_name in ratios.items():
        for name, ratio in by_name.items():
            print(f"{case}: {name} {ratio}")
    if options.json:
        document = {
            case: {side.name: {"round_s": side.seconds, "cpu_s": side.cpu} for side in sides}
            for case, sides in results.items()
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(by_name[ROUND].median <= BOUND for by_name in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
