"""The names of the experiments, and what each shows."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ExperimentEntry:
    """An experiment in the list."""

    name: str
    summary: str
    """At most 44 characters, so that a line of the list fits into 80 columns."""
    source: str
    """The paper whose experiment it reproduces."""


EXPERIMENTS: Final = (
    ExperimentEntry(
        "delay",
        "time of a run when clients are delayed",
        "Choi et al.",
    ),
    ExperimentEntry(
        "heterogeneity",
        "accuracy with skewed data, four algorithms",
        "FLScalize",
    ),
    ExperimentEntry("devices", "time of rounds with unequal devices", "FLScalize"),
    ExperimentEntry(
        "continual",
        "five runs, each from the last one's model",
        "Hong & Lee, fig. 20",
    ),
    ExperimentEntry(
        "compare A B",
        "two algorithms on the same data and seeds",
        "",
    ),
)
