"""What a round came to, put together from what its hooks see while it runs."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedbus.contracts.run import MAX_REPORTED_CLIENTS, RoundResult
from fedbus.learning.flower.grid import RoundTally
from fedbus.learning.flower.round_spans import RoundTrace
from fedbus.learning.round_metrics import normalize_metrics
from fedbus.learning.round_timing import split_round_time
from fedbus.learning.weights import Arrays

OnRound = Callable[[RoundResult, Arrays], None]


class RoundLog:
    """Tells *on_round* of each round from *first_round* on, once, when it has ended.

    Round 0 is the model that the run began with; a run taken up again has no round 0.
    """

    def __init__(
        self,
        model: Arrays,
        *,
        run: str,
        first_round: int,
        tally: Callable[[int], RoundTally],
        on_round: OnRound,
    ) -> None:
        self.trace = RoundTrace(run)
        self._model = model
        self._first_round = first_round
        self._tally = tally
        self._on_round = on_round
        self._metrics: dict[str, float] = {}
        self._contributions: dict[str, float] = {}
        self._last_reported = first_round - 1 if first_round > 1 else -1
        """The last round that was told of, by this process or the one before it."""
        self._round_started = time.monotonic()
        self._latest = model

    @property
    def latest(self) -> Arrays:
        """The global model as last seen, in the dtypes that it began with."""
        return self._cast_to_initial_dtypes(self._latest)

    def add_metrics(self, metrics: Mapping[str, Any] | None, *, prefix: str = "") -> None:
        """Figures of the round that runs: the server's own, or the clients' with their *prefix*."""
        self._metrics |= normalize_metrics(metrics or {}, prefix=prefix)

    def set_contributions(self, contributions: Mapping[str, float]) -> None:
        """What the updates of the round that runs were worth, by client."""
        self._contributions = dict(contributions)

    def set_model(self, arrays: Arrays) -> None:
        """The global model is now this."""
        self._latest = arrays

    def ended(self, round_number: int) -> None:
        """The round is over; told once, and not at all if it was told before this process began."""
        if round_number > self._last_reported:
            self._last_reported = round_number
            self._on_round(self._make_result(round_number), self.latest)
        self._metrics = {}
        self._contributions = {}
        self._round_started = time.monotonic()
        self.trace.ends()

    def _make_result(self, round_number: int) -> RoundResult:
        tally = self._tally(round_number) if round_number else RoundTally()
        times = split_round_time(tally.answers, time.monotonic())
        told = list(times)[:MAX_REPORTED_CLIENTS]
        return RoundResult(
            round=round_number,
            metrics=self._metrics,
            seconds=time.monotonic() - self._round_started,
            participants=tally.participants,
            failures=tally.failures,
            train_s=tally.train_s,
            contributions=self._contributions,
            figures={client: tally.figures[client] for client in told if tally.figures.get(client)},
            transfer_s={client: times[client]["transfer_s"] for client in told},
            wait_s={client: times[client]["wait_s"] for client in told},
        )

    def _cast_to_initial_dtypes(self, arrays: Arrays) -> Arrays:
        """A mean of integers is not one; a batch norm's counter stays what the architecture says."""
        return {
            name: _cast(self._model[name].dtype, array)
            if name in self._model and self._model[name].shape == array.shape
            else array
            for name, array in arrays.items()
        }


def _cast(dtype: np.dtype[Any], array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if dtype.kind in "iu" and array.dtype.kind == "f":
        array = np.rint(array)  # a mean of ones may come out as 0.9999999
    return array.astype(dtype, copy=False)
