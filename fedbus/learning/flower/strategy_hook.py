"""Around `Strategy.start`: the stored model goes in, rounds are told of as they end, the model comes out.

`start` is the one public method through which every app with a Flower strategy trains, whatever
the strategy. While the hook is installed, each `start` in the family of Strategy is wrapped; the
strategy at hand gets wrapped methods of its own for the time of the call, and nothing stays
behind. A round ends when the next is configured, or when `start` returns: so this also holds
for strategies with a loop of their own.

docs/decisions/0004-hook-into-strategy-start.md says why.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedbus.learning.flower.array_records import from_record
from fedbus.learning.flower.cohort import CohortPolicy
from fedbus.learning.flower.round_log import RoundLog
from fedbus.learning.weights import ArchitectureMismatch, Arrays, first_difference


class StrategyHook:
    """For one call of the ServerApp. *used* says whether it went through `Strategy.start` at all."""

    def __init__(
        self,
        model: Arrays,
        record: ArrayRecord,
        *,
        rounds: int,
        first_round: int,
        log: RoundLog,
        cohort: CohortPolicy,
    ) -> None:
        self._model = model
        self._record = record
        self._rounds = rounds
        self._offset = first_round - 1
        self._log = log
        self._cohort = cohort
        self._evaluate: Callable[..., Any] | None = None
        self._round = self._offset
        self._is_running = False
        self._model_names: dict[str, str] = {}
        """The stored model's names by the app's, where an app only numbers its arrays."""
        self.was_used = False

    @contextmanager
    def install(self) -> Iterator[None]:
        with ExitStack() as undo:
            for kind in loaded_subclasses(Strategy):
                if "start" in vars(kind):
                    undo.callback(setattr, kind, "start", kind.start)
                    kind.start = self._wrap_start(kind.start)
            yield

    def _wrap_start(self, start: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(start)
        def hooked(strategy: Strategy, *args: Any, **kwargs: Any) -> Any:
            if self._is_running:  # a strategy's own start that calls the one it inherits
                return start(strategy, *args, **kwargs)
            call = inspect.signature(start).bind(strategy, *args, **kwargs)
            call.apply_defaults()
            self._inject_initial_model(call.arguments)
            self._is_running = True
            try:
                with self._wrap_methods(strategy):
                    result = start(*call.args, **call.kwargs)
                self._log.ended(self._round)
            finally:
                self._is_running = False
                self._log.trace.ends()
            self._offset = self._round
            return self._renumber_rounds(result)

        return hooked

    def _inject_initial_model(self, arguments: dict[str, Any]) -> None:
        """The stored model and the rounds asked for; a second `start` of one app goes on as the app says."""
        if not self.was_used:
            own = self._model_as_named_by(arguments.get("initial_arrays"))
            ours = {"initial_arrays": own, "num_rounds": self._rounds}
            arguments.update({name: value for name, value in ours.items() if name in arguments})
        self.was_used = True
        evaluate = arguments.get("evaluate_fn")
        self._evaluate = evaluate
        if evaluate is not None:
            arguments["evaluate_fn"] = self._wrap_evaluate(evaluate)

    def _model_as_named_by(self, own: ArrayRecord | None) -> ArrayRecord:
        """The stored model by the names that the app itself uses; raises ArchitectureMismatch."""
        if not own:
            return self._record
        if list(own) == [str(number) for number in range(len(self._model))]:
            self._model_names = dict(zip(own, self._model, strict=True))
        if difference := first_difference(self._rename_arrays(own), self._model):
            raise ArchitectureMismatch(
                f"the stored model is not of the app's architecture: {difference}. "
                "Start a new lineage for the new architecture, or go back to the code that made the model"
            )
        names = {model: app for app, model in self._model_names.items()}
        return ArrayRecord({names.get(name, name): array for name, array in self._record.items()})

    def _rename_arrays(self, record: ArrayRecord) -> Arrays:
        """The arrays of *record* by the stored model's names."""
        arrays = from_record(record)
        return {self._model_names.get(name, name): array for name, array in arrays.items()}

    @contextmanager
    def _wrap_methods(self, strategy: Strategy) -> Iterator[None]:
        """Methods of the strategy's own, in front of those of its class, while `start` runs."""
        watched = {
            "configure_train": self._wrap_configure(strategy.configure_train),
            "configure_evaluate": self._wrap_round_offset(strategy.configure_evaluate),
            "aggregate_train": self._wrap_aggregate(strategy.aggregate_train),
            "aggregate_evaluate": self._wrap_aggregate_evaluate(strategy.aggregate_evaluate),
        }
        before = {name: vars(strategy)[name] for name in watched if name in vars(strategy)}
        vars(strategy).update(watched)
        try:
            yield
        finally:
            for name in watched:
                vars(strategy).pop(name)
            vars(strategy).update(before)

    def _wrap_configure(self, configure: Callable[..., Any]) -> Callable[..., Any]:
        def configure_train(server_round: int, arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
            self._log.set_model(self._rename_arrays(arrays))
            self._log.ended(self._round)
            self._round = server_round + self._offset
            self._log.trace.begins(self._round)
            return self._cohort.chosen(configure(self._round, arrays, *args, **kwargs), arrays)

        return configure_train

    def _wrap_aggregate(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_train(server_round: int, replies: Any) -> Any:
            with self._log.trace.aggregate_span(server_round + self._offset):
                arrays, metrics = self._cohort.aggregated(
                    lambda watched: aggregate(server_round + self._offset, watched),
                    replies,
                    round_number=server_round + self._offset,
                    evaluate=self._evaluate,
                    log=self._log,
                )
            if arrays is not None:
                self._log.set_model(self._rename_arrays(arrays))
            self._log.add_metrics(metrics, prefix="train_")
            return arrays, metrics

        return aggregate_train

    def _wrap_aggregate_evaluate(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_evaluate(server_round: int, replies: Any) -> Any:
            metrics = aggregate(server_round + self._offset, replies)
            self._log.add_metrics(metrics, prefix="eval_")
            return metrics

        return aggregate_evaluate

    def _wrap_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> Any:
            metrics = evaluate(server_round + self._offset, arrays)
            self._log.add_metrics(metrics)
            return metrics

        return evaluate_fn

    def _wrap_round_offset(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def shifted(server_round: int, *args: Any, **kwargs: Any) -> Any:
            return method(server_round + self._offset, *args, **kwargs)

        return shifted

    def _renumber_rounds(self, result: Any) -> Any:
        """What the app reads of the run counts rounds as the run does."""
        first = self._round - self._rounds
        for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
            if first and isinstance(by_round := getattr(result, name, None), dict):
                setattr(result, name, {number + first: metrics for number, metrics in by_round.items()})
        return result


def loaded_subclasses(kind: type) -> list[Any]:
    """*kind* and all that derives from it, as far as it is loaded."""
    found: set[type] = {kind}
    todo: list[type] = [kind]
    while todo:
        new: set[type] = set(todo.pop().__subclasses__()) - found
        found |= new
        todo += new
    return sorted(found, key=lambda one: one.__qualname__)
