"""The names of the experiments, and what each shows."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ExperimentEntry:
    """An experiment in the list."""

    name: str
    summary: str
    source: str
    """The paper whose experiment it reproduces."""


EXPERIMENTS: Final = (
    ExperimentEntry(
        "delay",
        "time of a run under delays of 3, 4, 5 s with probability 0 to 1; sync, deadline and buffered",
        "Choi et al.",
    ),
    ExperimentEntry(
        "heterogeneity",
        "accuracy of local and global models with IID, imbalanced and skewed data; four algorithms",
        "FLScalize",
    ),
    ExperimentEntry("devices", "time of rounds with three groups of unequal devices", "FLScalize"),
    ExperimentEntry(
        "continual",
        "five runs in a row, each of which continues with the model of the last one",
        "Hong & Lee, fig. 20",
    ),
    ExperimentEntry(
        "compare A B",
        "two algorithms or configurations on the same data and seeds, with confidence intervals",
        "",
    ),
)
