"""What the benchmarks of a round share: the case, the environment of the app, and its stamps."""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

APP: Final = Path(__file__).parent / "noop_app"
MIB: Final = 1024**2


class SideFailed(Exception):
    """One of the systems did not come to the end of its rounds; the text says where to look."""


@dataclass(frozen=True)
class Case:
    """So many clients, and a model of so many MiB, which goes to each of them and comes back from each."""

    clients: int
    mib: float

    @property
    def size_bytes(self) -> int:
        return round(self.mib * MIB)

    def __str__(self) -> str:
        return f"{self.clients} clients × {self.mib:g} MiB"

    def environment(self, stamps: Path) -> dict[str, str]:
        """What tells the app its size, and where to write the time."""
        return {
            "NOOP_BYTES": str(self.size_bytes),
            "NOOP_CLIENTS": str(self.clients),
            "NOOP_STAMPS": str(stamps),
        }


def read_stamps(stamps: Path) -> list[float]:
    """The times in *stamps*, by round: the first is the beginning of round 1. A repeated round counts once."""
    if not stamps.exists():
        return []
    times = dict(line.split() for line in stamps.read_text().splitlines() if line.count(" ") == 1)
    return [float(time) for time in times.values()]


def seconds_of_rounds(stamps: Path, *, skip: int) -> list[float]:
    """How long each round took, but for the first *skip*, in which everything is new to everybody."""
    times = read_stamps(stamps)
    return [after - before for before, after in itertools.pairwise(times)][skip:]


def load_average() -> float:
    """How many processes wanted a core in the last minute: what else went on here."""
    return os.getloadavg()[0]
