"""Measure the cost of traces and log lines: rounds with and without them, alternately.

    python -m benchmarks.tracing [--case 2x0.25] [--turns 20] [--turn 150] [--cold 5] [--products 0] [--same]
                                 [--json FILE]

*Default*: spans are created and stored in FEDBUS_HOME/traces, log lines are written at level info. *Without*:
OpenTelemetry's SDK is disabled and nothing is logged. Two whole federations run at the same time, one of each
kind. They take turns of some seconds: while one runs, the other waits in its ServerApp. So a machine that
is slower for a minute is slower for both, and no two starts are compared. The output is the median ratio over the
pairs of turns with its 95 % interval (bootstrap), for the duration of a round
and for the CPU time of all processes of a federation. With ``--same`` both
federations have default settings: the output is the error of the measurement. With ``--products`` each
client multiplies that many matrices in a round instead of training.
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
from benchmarks.rounds import Case, SideFailed, load_average, read_stamps
from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.app import telemetry
from fedbus.app.entrypoints.signals import stop_on_signals

BOUND: Final = 1.03
POLL_S: Final = 0.05
START_S: Final = 120.0
PIPE: Final = "turns"
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
    """Rounds at the start of a turn that do not count, because the caches hold the other federation's data."""
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    async def take_turn(self, rounds: range) -> None:
        """Run *rounds*, and record their duration."""
        before = self._cpu_s()
        await self._let_go()
        while len(read_stamps(self._stamps)) <= rounds.stop:  # noqa: ASYNC110  # the app has no notification
            await asyncio.sleep(POLL_S)
        self.cpu.append((self._cpu_s() - before) / len(rounds))
        times = read_stamps(self._stamps)[rounds.start : rounds.stop + 1]
        steady = [after - first for first, after in itertools.pairwise(times)][self.cold :]
        self.seconds.append(statistics.median(steady))

    async def waits(self) -> None:
        """Wait until its run has started and waits for its first turn."""
        async with asyncio.timeout(START_S):
            while not read_stamps(self._stamps):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)

    async def _let_go(self) -> None:
        """Open and close the pipe that its ServerApp reads."""
        while True:
            with contextlib.suppress(OSError):  # ENXIO: it has written the time stamp, and does not read yet
                os.close(os.open(self.home / PIPE, os.O_WRONLY | os.O_NONBLOCK))
                return
            await asyncio.sleep(POLL_S)

    @property
    def _stamps(self) -> Path:
        return self.home / on_fedbus.STAMPS

    def _cpu_s(self) -> float:
        """The CPU time of all its processes so far."""
        total = 0.0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if str(self.home) in " ".join([*process.cmdline(), process.environ().get("FEDBUS_HOME", "")]):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total


@dataclass(frozen=True)
class PairedRatio:
    """The ratios of the pairs of turns."""

    pairs: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.pairs)

    def span(self, draws: int = 4000) -> tuple[float, float]:
        """The 95 % interval of the median (percentile bootstrap; Efron 1979)."""
        dice = random.Random(1)
        drawn = sorted(statistics.median(dice.choices(self.pairs, k=len(self.pairs))) for _ in range(draws))
        return drawn[int(0.025 * draws)], drawn[int(0.975 * draws)]

    def __str__(self) -> str:
        low, high = self.span()
        return f"{self.median:.3f} × ({low:.3f} to {high:.3f})"


@contextmanager
def set_environment(of_side: Mapping[str, str]) -> Iterator[None]:
    """Set variables that every process started inside inherits."""
    before = dict(os.environ)
    os.environ.update(of_side)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


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
    async with AsyncExitStack() as open_things:
        with set_environment(turns | dict({} if options.same else SIDES[side.name])):
            await open_things.enter_async_context(
                on_fedbus.start_run(case, options.turns * options.turn, side.home)
            )
            await side.waits()
        yield


async def measure(case: Case, options: argparse.Namespace) -> list[BenchmarkSide]:
    """Run all turns of both federations."""
    with tempfile.TemporaryDirectory(prefix="fedbus-tracing-", ignore_cleanup_errors=True) as where:
        sides = [BenchmarkSide(name, Path(where) / name.replace(" ", "-"), options.cold) for name in SIDES]
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
    """The ratios of wall-clock and CPU time."""
    ours, bare = sides
    return {
        "a round": PairedRatio([one / other for one, other in zip(ours.seconds, bare.seconds, strict=True)]),
        "its processors' time": PairedRatio(
            [one / other for one, other in zip(ours.cpu, bare.cpu, strict=True)]
        ),
    }


async def _run_until_signal(options: argparse.Namespace) -> dict[str, list[BenchmarkSide]]:
    found: dict[str, list[BenchmarkSide]] = {}

    async def all_cases() -> None:
        for case in options.case:
            found[str(case)] = await measure(case, options)

    with stop_on_signals() as stop:
        await wait_for_first(all_cases(), stop.wait())
    return found


def _parse_case(text: str) -> Case:
    clients, _, mib = text.partition("x")
    return Case(int(clients), float(mib))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=_parse_case, nargs="+", default=[Case(2, 0.25)], metavar="NxMIB")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--turn", type=int, default=150, help="rounds in each turn")
    parser.add_argument(
        "--cold", type=int, default=5, help="rounds at the start of each turn that do not count"
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
    found: dict[str, list[BenchmarkSide]] = {}
    broken = False
    try:
        found = asyncio.run(_run_until_signal(options))
    except* SideFailed as failed:
        broken = True
        print(*failed.exceptions, sep="\n", file=sys.stderr)
    if broken:
        return 1
    ratios = {case: summarize(sides) for case, sides in found.items()}
    for case, by_name in ratios.items():
        for name, ratio in by_name.items():
            print(f"{case}: {name} {ratio}")
    if options.json:
        facts = {
            case: {side.name: {"round_s": side.seconds, "cpu_s": side.cpu} for side in sides}
            for case, sides in found.items()
        }
        options.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0 if all(by_name["a round"].median <= BOUND for by_name in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
