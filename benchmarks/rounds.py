"""Shared code of the round benchmarks: cases, the environment of the app, and its time stamps."""

import argparse
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

APP: Final = Path(__file__).parent / "noop_app"
MIB: Final = 1024**2


class SideFailed(Exception):
    """One of the systems did not finish its rounds. The text names its logs."""


@dataclass(frozen=True)
class Case:
    """The number of clients, and the size in MiB of the model that goes to and returns from each of them."""

    clients: int
    mib: float

    @property
    def size_bytes(self) -> int:
        return round(self.mib * MIB)

    def __str__(self) -> str:
        return f"{self.clients} clients × {self.mib:g} MiB"

    def environment(self, stamps: Path) -> dict[str, str]:
        """Return the environment of the app: the size of its model, and the file for time stamps."""
        return {
            "NOOP_BYTES": str(self.size_bytes),
            "NOOP_CLIENTS": str(self.clients),
            "NOOP_STAMPS": str(stamps),
        }


def parse_case(text: str) -> Case:
    """Parse ``<clients>x<MiB>``. Raises argparse.ArgumentTypeError."""
    clients, _, mib = text.partition("x")
    try:
        case = Case(int(clients), float(mib))
    except ValueError:
        case = Case(0, 0)
    if not (1 <= case.clients <= 64 and 0 < case.mib <= 1024):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid case. Write clients x MiB, for example 4x10"
        )
    return case


def read_stamps(stamps: Path) -> list[float]:
    """Read the times in *stamps*, by round: the first is the start of round 1. A repeated round counts once."""
    if not stamps.exists():
        return []
    times = dict(line.split() for line in stamps.read_text().splitlines() if line.count(" ") == 1)
    return [float(time) for time in times.values()]


def seconds_of_rounds(stamps: Path, *, skip: int) -> list[float]:
    """Return the duration of each round in seconds, without the first *skip* rounds, which are a warm-up."""
    times = read_stamps(stamps)
    return [after - before for before, after in itertools.pairwise(times)][skip:]


def load_average() -> float:
    """Return the load average of the last minute, which includes other processes."""
    return os.getloadavg()[0]
