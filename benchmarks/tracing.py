"""What traces and log lines cost: a round in which nothing is learned, with them and without, in turns.

    python -m benchmarks.tracing [--case 2x0.25 4x10] [--repeat 4] [--json FILE]

*As it comes*: spans are made and kept in FEDBUS_HOME/traces, lines are written at info. *Without*: OpenTelemetry's
SDK is disabled and nothing is logged. Everything is started anew each time, the order changes each time, so that
a machine that is busy is busy for both. Printed are medians over all rounds, and their ratio; the exit code is
1 where it is above the bound. Where other work makes the time of rounds useless, the processors' time of all processes
of fedbus, a round, which is printed too, is still worth something. docs/observability.md says what was seen.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks import on_fedbus
from benchmarks.rounds import Case, SideFailed, load, stamped
from fedbus.agents.tasks import first_of
from fedbus.app import telemetry
from fedbus.app.processes import stopping

BOUND: Final = 1.03
ROUNDS: Final = 60
LOOK_S: Final = 0.02
SIDES: Final[Mapping[str, Mapping[str, str]]] = {
    "as it comes": {},
    "without": {"OTEL_SDK_DISABLED": "true", "FEDBUS_LOG_LEVEL": "critical"},
}


@dataclass
class Result:
    """Seconds of each round of one case, by side, repeat after repeat."""

    case: Case
    seconds: dict[str, list[list[float]]] = field(default_factory=lambda: {side: [] for side in SIDES})

    cpu: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    """Seconds of processors a round, by side."""

    def median(self, side: str) -> float:
        return statistics.median(one for repeat in self.seconds[side] for one in repeat)

    @property
    def ratio(self) -> float:
        """How many times as long a round takes with traces and lines."""
        return self.median("as it comes") / self.median("without")

    @property
    def ratios(self) -> list[float]:
        """The same of each repeat by itself: how far they are apart is how far to believe them."""
        pairs = zip(self.seconds["as it comes"], self.seconds["without"], strict=True)
        return [statistics.median(ours) / statistics.median(bare) for ours, bare in pairs]

    @property
    def cpu_ratio(self) -> float:
        ours, bare = (statistics.median(self.cpu[side]) for side in SIDES)
        return ours / bare

    def as_json(self) -> dict[str, Any]:
        return {
            "case": str(self.case),
            "ratio": self.ratio,
            "ratios": self.ratios,
            "rounds_s": self.seconds,
            "cpu_s": self.cpu,
            "cpu_ratio": self.cpu_ratio,
        }


@contextmanager
def environment(of_side: Mapping[str, str]) -> Iterator[None]:
    """Handed on to every process that is started inside."""
    os.environ.update(of_side)
    try:
        yield
    finally:
        for name in of_side:
            del os.environ[name]


async def measure(options: argparse.Namespace, results: list[Result]) -> None:
    for repeat in range(options.repeat):
        for result in results:
            for side in list(SIDES)[:: 1 if repeat % 2 else -1]:
                with tempfile.TemporaryDirectory(
                    prefix="fedbus-tracing-", ignore_cleanup_errors=True
                ) as where:
                    busy = load()
                    with environment(SIDES[side]):
                        rounds, cpu = await asyncio.gather(
                            on_fedbus.rounds(result.case, options.rounds, Path(where)),
                            cpu_of_a_round(Path(where) / "stamps", options.rounds),
                        )
                result.seconds[side].append(rounds)
                result.cpu[side].append(cpu)
                median = statistics.median(rounds) * 1000
                print(
                    f"{repeat + 1}/{options.repeat}  {result.case}  {side:<11}  {median:7.2f} ms  "
                    f"{cpu * 1000:7.2f} ms of processors  load {busy:.1f}",
                    flush=True,
                )


async def cpu_of_a_round(stamps: Path, rounds: int) -> float:
    """What all processes below this one spend in a round, in seconds, on average from the third to nearly the last."""
    first, last = 3, rounds - 2
    begun = await _cpu_when(stamps, first)
    return (await _cpu_when(stamps, last) - begun) / (last - first)


async def _cpu_when(stamps: Path, told: int) -> float:
    while len(stamped(stamps)) < told:  # noqa: ASYNC110  # the app writes into a file, and tells nobody
        await asyncio.sleep(LOOK_S)
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def _until_told(options: argparse.Namespace, results: list[Result]) -> None:
    with stopping() as stop:
        await first_of(measure(options, results), stop.wait())


def _case(text: str) -> Case:
    clients, _, mib = text.partition("x")
    return Case(int(clients), float(mib))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", type=_case, nargs="+", default=[Case(2, 0.25), Case(4, 10)], metavar="NxMIB"
    )
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    telemetry.log_to_stderr(level="ERROR")
    results = [Result(case) for case in options.case]
    broken = False
    try:
        asyncio.run(_until_told(options, results))
    except* SideFailed as failed:
        broken = True
        print(*failed.exceptions, sep="\n", file=sys.stderr)
    if broken:
        return 1
    for result in results:
        ratios = ", ".join(f"{one:.3f}" for one in result.ratios)
        medians = " / ".join(f"{result.median(side) * 1000:.2f} ms" for side in SIDES)
        print(f"{result.case}: {medians} = {result.ratio:.3f} × (each repeat: {ratios})")
        print(f"{result.case}: processors' time = {result.cpu_ratio:.3f} ×")
    if options.json:
        options.json.write_text(json.dumps([result.as_json() for result in results], indent=2) + "\n")
    return 0 if all(result.ratio <= BOUND for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
