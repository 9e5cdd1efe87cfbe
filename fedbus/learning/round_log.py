"""Collects the result of each round, and reports it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import fields as dataclass_fields
from typing import Any, Final

from fedbus.contracts.run import MAX_REPORTED_CLIENTS, RoundResult, shorten_reasons
from fedbus.learning.aggregation_planner import AggregationReport
from fedbus.learning.library import NoUpdates, OnRound, RoundTally
from fedbus.learning.round_metrics import normalize_metrics
from fedbus.learning.round_spans import RoundTrace
from fedbus.learning.round_timing import split_round_time
from fedbus.learning.weights import Arrays, cast

MAX_EVALUATION_FAILURE_CHARS: Final = 300
MAX_NAMED_CLIENTS: Final = 5
"""Clients whose names are in the reason of a failed run."""


class RoundLog:
    """Calls *on_round* once for each round from *first_round* on, after its end.

    *model* is the initial model, *tally* returns the participants of a round, *now* is the clock of the messages, in
    seconds. Round 0 is the initial model; a resumed run has no round 0.
    """

    def __init__(
        self,
        model: Arrays,
        *,
        run: str,
        first_round: int,
        tally: Callable[[int], RoundTally],
        on_round: OnRound,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self.trace = RoundTrace(run)
        self._model = model
        self._tally = tally
        self._on_round = on_round
        self._metrics: dict[str, float] = {}
        self._contributions: dict[str, float] = {}
        self._last_reported = first_round - 1 if first_round > 1 else -1
        """The last round that this process or its predecessor reported."""
        self._round_started = now()
        self._aggregation: AggregationReport | None = None
        self._latest = model
        self._is_resumed = first_round > 1
        self._has_updates = False
        self._training_failures: dict[str, str] = {}
        """The first reason of each client, in all rounds."""
        self._late_updates = 0
        """Updates that came after the deadline of their round and were dropped."""

    @property
    def latest(self) -> Arrays:
        """The latest global model, in the dtypes of the initial model."""
        return self._cast_to_initial_dtypes(self._latest)

    def add_metrics(self, metrics: Mapping[str, Any] | None, *, prefix: str = "") -> None:
        """Add metrics to the current round: the server's own, or the clients' with their *prefix*."""
        self._metrics |= normalize_metrics(metrics or {}, prefix=prefix)

    def set_contributions(self, contributions: Mapping[str, float]) -> None:
        """Set the contributions of the current round, by client."""
        self._contributions = dict(contributions)

    def set_aggregation(self, report: AggregationReport) -> None:
        """Set what the aggregation of the current round consists of, if the mode is not ``sync``."""
        self._aggregation = report
        self.trace.describe_aggregation(report)

    def set_model(self, arrays: Arrays) -> None:
        """Set the latest global model."""
        self._latest = arrays

    def end_round(self, round_number: int, tally: RoundTally | None = None) -> None:
        """End the round, and report it unless it has been reported, by this process or its predecessor.

        *tally* has its participants; None: those of *round_number*.
        """
        if round_number > self._last_reported:
            self._last_reported = round_number
            if tally is None:
                tally = self._tally(round_number) if round_number else RoundTally()
            self.add_outcome(tally)
            self._on_round(self._make_result(round_number, tally), self.latest)
        self._metrics = {}
        self._contributions = {}
        self._aggregation = None
        self._round_started = self._now()
        self.trace.end_round()

    def add_outcome(self, tally: RoundTally) -> None:
        """Count the updates and the failures of a round for `check_updates`."""
        self._has_updates = self._has_updates or bool(tally.participants)
        for client, reason in tally.training_failures.items():
            self._training_failures.setdefault(client, reason)
        self._late_updates += self._aggregation.late_dropped if self._aggregation else 0

    def check_updates(self) -> None:
        """Check at the end of a run that a client could train, if one had to.

        A resumed run passes: the rounds before it may have updates.

        Raises:
            NoUpdates: training failed in each round, or each update came too late.

        """
        if self._has_updates or self._is_resumed:
            return
        if self._training_failures:
            raise NoUpdates(
                f"no client could train in any round: {describe_failures(self._training_failures)}"
            )
        if self._late_updates:
            raise NoUpdates(
                f"no round has an update: {self._late_updates} came after the deadline and were dropped. "
                'Raise `deadline-s` in [tool.fedbus.aggregation], or set late = "merge"'
            )

    def _make_result(self, round_number: int, tally: RoundTally) -> RoundResult:
        now = self._now()
        times = split_round_time(tally.exchanges, now)
        clients = list(times)[:MAX_REPORTED_CLIENTS]
        return RoundResult(
            round=round_number,
            metrics=self._metrics,
            seconds=now - self._round_started,
            participants=tally.participants,
            failures=shorten_reasons(tally.failures),
            evaluation_failure=describe_evaluation_failure(tally),
            train_s=tally.train_s,
            contributions=self._contributions,
            figures={client: tally.figures[client] for client in clients if tally.figures.get(client)},
            transfer_s={client: times[client]["transfer_s"] for client in clients},
            wait_s={client: times[client]["wait_s"] for client in clients},
            **_aggregation_fields(self._aggregation),
        )

    def _cast_to_initial_dtypes(self, arrays: Arrays) -> Arrays:
        """Cast *arrays*: the mean of an integer tensor, such as a batch norm's counter, is a float."""
        return {
            name: cast(array, self._model[name].dtype)
            if name in self._model and self._model[name].shape == array.shape
            else array
            for name, array in arrays.items()
        }


def _aggregation_fields(report: AggregationReport | None) -> dict[str, Any]:
    """Return the fields of a `RoundResult` for *report*; none for the mode ``sync``."""
    if report is None:
        return {}
    fields = {one.name: getattr(report, one.name) for one in dataclass_fields(report)}
    return {**fields, "staleness": dict(list(report.staleness.items())[:MAX_REPORTED_CLIENTS])}


def describe_failures(failures: Mapping[str, str]) -> str:
    """Return the first of *failures*, with the names of the other clients."""
    (client, reason), *others = failures.items()
    if not others:
        return f"{client}: {reason}"
    names = ", ".join(name for name, _ in others[:MAX_NAMED_CLIENTS])
    more = f" and {len(others) - MAX_NAMED_CLIENTS} more" if len(others) > MAX_NAMED_CLIENTS else ""
    return f"{client}: {reason} (failed too: {names}{more})"


def describe_evaluation_failure(tally: RoundTally) -> str:
    """Return why no client evaluated the model of the round; empty if one did, or none had to."""
    if tally.evaluated or not tally.evaluation_failures:
        return ""
    client, reason = min(tally.evaluation_failures.items())
    others = len(tally.evaluation_failures) - 1
    more = f" (and {others} more client{'s' * (others > 1)})" if others else ""
    start = f"no client could evaluate the model: {client}: "
    return f"{start}{reason[: MAX_EVALUATION_FAILURE_CHARS - len(start) - len(more)]}{more}"
