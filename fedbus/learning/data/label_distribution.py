"""How many samples of each class the clients have."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedbus.learning.data.images import Array
from fedbus.learning.data.partitions import Partitions


@dataclass(frozen=True, eq=False)
class LabelDistribution:
    """The number of samples of each client and class, int64 (clients, classes), and the names of the classes."""

    counts: Array
    class_names: tuple[str, ...]
    unused: Array
    """The number of samples of each class that no client has, int64 (classes,)."""

    @classmethod
    def of(cls, labels: Array, partitions: Partitions, class_names: tuple[str, ...]) -> "LabelDistribution":
        """Count the *labels*, which are numbers of *class_names*, in each of *partitions*."""
        classes = len(class_names)
        counts = np.stack([np.bincount(labels[part], minlength=classes) for part in partitions])
        return cls(counts, class_names, np.bincount(labels, minlength=classes) - counts.sum(axis=0))

    @property
    def sizes(self) -> Array:
        """The number of samples of each client (clients,)."""
        return np.asarray(self.counts.sum(axis=1))

    @property
    def classes_per_client(self) -> Array:
        """The number of classes of each client (clients,)."""
        return np.asarray((self.counts > 0).sum(axis=1))

    @property
    def skew(self) -> float:
        """The mean total variation distance between a client's label distribution and that of all clients, 0 to 1."""
        shares = self.counts / self.sizes[:, None]
        overall = self.counts.sum(axis=0) / self.counts.sum()
        return float(np.abs(shares - overall).sum(axis=1).mean() / 2)

    def to_json(self) -> dict[str, Any]:
        """Return the distribution as JSON types."""
        return {
            "classes": list(self.class_names),
            "counts": self.counts.tolist(),
            "unused": self.unused.tolist(),
            "skew": round(self.skew, 6),
            "sizes": _summarize(self.sizes),
            "classes_per_client": _summarize(self.classes_per_client),
        }


def _summarize(numbers: Array) -> dict[str, float]:
    return {"min": int(numbers.min()), "median": float(np.median(numbers)), "max": int(numbers.max())}
