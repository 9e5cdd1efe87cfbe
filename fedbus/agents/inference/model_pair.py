"""Two models on the same requests: which of them answers, and the metrics of their comparison.

    shadow   the old model answers; the new model predicts the same samples, for the comparison only
    canary   the new model answers a share of the requests
    watch    the new model answers all requests; the old one stays loaded as fallback

The pair only collects the metrics; `fedbus.domain.serving_gates` decides on them.
"""

import asyncio
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from fedbus.agents.inference.loaded_model import LoadedModel
from fedbus.contracts.serving import ModelComparison

MAX_RECENT_TIMES: Final = 500
"""Durations kept of each model, for their median."""


class ComparisonRole(StrEnum):
    """The role of the new model in a pair."""

    SHADOW = "shadow"
    CANARY = "canary"
    WATCH = "watch"


@dataclass(eq=False)
class ModelPair:
    """Two models on the same requests, and the metrics of their comparison."""

    old: LoadedModel
    new: LoadedModel
    role: ComparisonRole
    share: float = 0.0
    """Share of the requests that a canary answers, 0 to 1."""
    samples: int = 0
    errors: int = 0
    reason: str = ""
    """The last error of the new model."""
    compared_samples: int = 0
    """Number of samples that both models have predicted."""
    disagreements: int = 0
    old_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_TIMES))
    new_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_TIMES))
    started_at: float = field(default_factory=time.monotonic)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after each change of the metrics."""
    is_shadow_busy: bool = False
    canary_credit: float = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_at

    def routes_to_canary(self) -> bool:
        """Decide whether the canary answers the next request; deterministic, so that it gets exactly its share."""
        self.canary_credit += self.share
        if self.canary_credit < 1:
            return False
        self.canary_credit -= 1
        return True

    def compare(self) -> ModelComparison:
        """Return the metrics without the PSI of the predictions, which takes longer to compute."""
        return ModelComparison(
            samples=self.samples,
            errors=self.errors,
            disagreement=self.disagreements / self.compared_samples if self.compared_samples else None,
            old_ms=_median_ms(self.old_s),
            new_ms=_median_ms(self.new_s),
        )


def _median_ms(seconds: deque[float]) -> float | None:
    return 1000 * statistics.median(seconds) if seconds else None
