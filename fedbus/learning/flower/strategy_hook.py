"""A hook around `Strategy.start` that injects the stored model, reports each round, and takes the final model.

Every app with a Flower strategy trains through the public method `start`. While the hook is installed, `start`
of `Strategy` and of each loaded subclass is wrapped. During the call, the strategy's methods are wrapped on the
instance; afterwards everything is restored. A round ends when the next one is configured, or when `start`
returns, so that the hook also works for a strategy with its own loop.

The decision is in docs/decisions/0004-hook-into-strategy-start.md.
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
from fedbus.learning.round_log import RoundLog
from fedbus.learning.weights import ArchitectureMismatch, Arrays, first_difference


class StrategyHook:
    """The hook for one call of a ServerApp.

    *model* and *record* are the stored model; *rounds* is the number of rounds left, the first of which is
    *first_round*. `was_used` is True if the app called `Strategy.start`.
    """

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
        """The stored tensor names by the app's, if the app only numbers its arrays."""
        self.was_used = False

    @contextmanager
    def install(self) -> Iterator[None]:
        """Wrap `start` of all loaded strategies until the block ends."""
        with ExitStack() as undo:
            for strategy_class in loaded_subclasses(Strategy):
                if "start" in vars(strategy_class):
                    undo.callback(setattr, strategy_class, "start", strategy_class.start)
                    strategy_class.start = self._wrap_start(strategy_class.start)
            yield

    def _wrap_start(self, start: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(start)
        def hooked(strategy: Strategy, *args: Any, **kwargs: Any) -> Any:
            if self._is_running:  # an overridden start that calls the inherited one
                return start(strategy, *args, **kwargs)
            call = inspect.signature(start).bind(strategy, *args, **kwargs)
            call.apply_defaults()
            self._inject_initial_model(call.arguments)
            self._is_running = True
            try:
                with self._wrap_methods(strategy):
                    result = start(*call.args, **call.kwargs)
                self._log.end_round(self._round)
            finally:
                self._is_running = False
                self._log.trace.end_round()
            self._offset = self._round
            return self._renumber_rounds(result)

        return hooked

    def _inject_initial_model(self, arguments: dict[str, Any]) -> None:
        """Set the stored model and the planned rounds. A second `start` of an app keeps the app's own arguments."""
        if not self.was_used:
            initial = self._model_with_names_of(arguments.get("initial_arrays"))
            injected = {"initial_arrays": initial, "num_rounds": self._rounds}
            arguments.update({name: value for name, value in injected.items() if name in arguments})
        self.was_used = True
        evaluate = arguments.get("evaluate_fn")
        self._evaluate = evaluate
        if evaluate is not None:
            arguments["evaluate_fn"] = self._wrap_evaluate(evaluate)

    def _model_with_names_of(self, app_record: ArrayRecord | None) -> ArrayRecord:
        """Return the stored model with the tensor names of *app_record*. Raises ArchitectureMismatch."""
        if not app_record:
            return self._record
        if list(app_record) == [str(number) for number in range(len(self._model))]:
            self._model_names = dict(zip(app_record, self._model, strict=True))
        if difference := first_difference(self._rename_arrays(app_record), self._model):
            raise ArchitectureMismatch(
                f"the stored model does not have the app's architecture: {difference}. "
                "Start a new lineage for the new architecture, or return to the code that built the model"
            )
        names = {model: app for app, model in self._model_names.items()}
        return ArrayRecord({names.get(name, name): array for name, array in self._record.items()})

    def _rename_arrays(self, record: ArrayRecord) -> Arrays:
        """Return the arrays of *record* by the tensor names of the stored model."""
        arrays = from_record(record)
        return {self._model_names.get(name, name): array for name, array in arrays.items()}

    @contextmanager
    def _wrap_methods(self, strategy: Strategy) -> Iterator[None]:
        """Wrap the methods of *strategy* on the instance while `start` runs."""
        wrapped = {
            "configure_train": self._wrap_configure(strategy.configure_train),
            "configure_evaluate": self._wrap_round_offset(strategy.configure_evaluate),
            "aggregate_train": self._wrap_aggregate(strategy.aggregate_train),
            "aggregate_evaluate": self._wrap_aggregate_evaluate(strategy.aggregate_evaluate),
        }
        overridden = {name: vars(strategy)[name] for name in wrapped if name in vars(strategy)}
        vars(strategy).update(wrapped)
        try:
            yield
        finally:
            for name in wrapped:
                vars(strategy).pop(name)
            vars(strategy).update(overridden)

    def _wrap_configure(self, configure: Callable[..., Any]) -> Callable[..., Any]:
        def configure_train(server_round: int, arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
            self._log.set_model(self._rename_arrays(arrays))
            self._log.end_round(self._round)
            self._round = server_round + self._offset
            self._log.trace.begin_round(self._round)
            return self._cohort.select_messages(configure(self._round, arrays, *args, **kwargs), arrays)

        return configure_train

    def _wrap_aggregate(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_train(server_round: int, replies: Any) -> Any:
            with self._log.trace.aggregate_span(server_round + self._offset):
                arrays, metrics = self._cohort.aggregate(
                    lambda observed: aggregate(server_round + self._offset, observed),
                    replies,
                    round_number=server_round + self._offset,
                    evaluate=self._evaluate,
                    round_log=self._log,
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
        """Renumber the app's metrics history to the rounds of the run."""
        first = self._round - self._rounds
        for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
            if first and isinstance(by_round := getattr(result, name, None), dict):
                setattr(result, name, {number + first: metrics for number, metrics in by_round.items()})
        return result


def loaded_subclasses(base: type) -> list[Any]:
    """Return *base* and all its subclasses that are imported, sorted by name."""
    classes: set[type] = {base}
    unvisited: list[type] = [base]
    while unvisited:
        new: set[type] = set(unvisited.pop().__subclasses__()) - classes
        classes |= new
        unvisited += new
    return sorted(classes, key=lambda cls: cls.__qualname__)
