"""A hook around `Strategy.start` that injects the stored model, reports each round, and takes the final model.

Every app with a Flower strategy trains through the public method `start`. While the hook is installed, `start`
of `Strategy` and of each subclass is wrapped. During the call, the strategy's methods are wrapped on the
instance; afterwards everything is restored. A round ends when the next one is configured, or when `start`
returns, so that the hook also works for a strategy with its own loop.

The app sees Flower's own behaviour: its number of rounds, rounds from 1 in each `start`, and its results. Only a
run with a number of rounds of its own, or one that resumes, changes the number of the first `start`.

The decision is in docs/decisions/0004-hook-into-strategy-start.md.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Final, TypeVar

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from fedbus.learning.flower.array_records import from_record, to_record, with_types_of
from fedbus.learning.flower.cohort import CohortPolicy
from fedbus.learning.flower.model_binding import ModelBinding
from fedbus.learning.flower.partial_sums import SummableMessages
from fedbus.learning.flower.private_api import CHECK_REPLIES
from fedbus.learning.flower.replies import StreamedMessages
from fedbus.learning.flower.reply_differences import describe_differences
from fedbus.learning.flower.round_counter import RoundCounter
from fedbus.learning.flower.run_grid import RunGrid
from fedbus.learning.flower.strategy_modes import StrategyModes
from fedbus.learning.flower.streaming_aggregation import allows_streaming
from fedbus.learning.flower.update_check import has_arrays_of_the_model
from fedbus.learning.round_log import RoundLog
from fedbus.learning.weights import Arrays

T = TypeVar("T")
_STOCK_START: Final = Strategy.start
_HISTORIES: Final = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")


class StrategyHook:
    """The hook for one call of a ServerApp. *bind_model* binds the app's arrays to the stored model.

    `was_used` is True if the app called `Strategy.start`.
    """

    def __init__(
        self,
        bind_model: Callable[[Arrays], ModelBinding],
        *,
        rounds: RoundCounter,
        log: RoundLog,
        cohort: CohortPolicy,
        grid: RunGrid,
        streaming: bool,
        modes: StrategyModes | None = None,
    ) -> None:
        self._bind_model = bind_model
        self._rounds = rounds
        self._log = log
        self._cohort = cohort
        self._grid = grid
        self._streaming = streaming
        self._modes = modes
        """The exchanges of an aggregation mode other than ``sync``."""
        self._binding = ModelBinding({})
        self._types = ArrayRecord()
        """The app's initial arrays, for the serialization types of those that are bytes."""
        self._evaluate: Callable[..., Any] | None = None
        self._is_running = False
        self._is_stock_loop = False
        """Whether Flower's own `start` runs, which passes the replies to `aggregate_train` and releases them."""
        self._is_prepared = False
        """Whether the arguments of this `start` are replaced."""
        self._is_injected = False
        """Whether a `start` has begun with the stored model."""
        self.was_used = False

    @contextmanager
    def install(self) -> Iterator[None]:
        """Wrap `start` of all strategies until the block ends, also of those that are defined meanwhile."""
        with ExitStack() as undo:
            for strategy_class in loaded_subclasses(Strategy):
                self._wrap_class(strategy_class, undo)

            def wrap_new_class(cls: type[Strategy], /, **options: Any) -> None:
                super(Strategy, cls).__init_subclass__(**options)
                self._wrap_class(cls, undo)

            undo.callback(delattr, Strategy, "__init_subclass__")
            Strategy.__init_subclass__ = classmethod(wrap_new_class)  # type: ignore[assignment, method-assign]
            yield

    def _wrap_class(self, strategy_class: Any, undo: ExitStack) -> None:
        if "start" in vars(strategy_class):
            undo.callback(setattr, strategy_class, "start", strategy_class.start)
            strategy_class.start = self._wrap_start(strategy_class.start)

    def _wrap_start(self, start: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(start)
        def hooked(strategy: Strategy, *args: Any, **kwargs: Any) -> Any:
            call = inspect.signature(start).bind(strategy, *args, **kwargs)
            call.apply_defaults()
            if self._is_running:  # an overridden start that calls the inherited one
                return self._run_inherited(start, call)
            if self._modes is not None:
                self._modes.begin_training(strategy)
            self._is_running, self._is_prepared = True, False
            try:
                with self._wrap_methods(strategy):
                    result = self._run_inherited(start, call)
                self._take_result(result)
            finally:
                self._is_running = False
                self._log.trace.end_round()
                self._grid.set_round(None)
            return self._complete_result(result)

        return hooked

    def _run_inherited(self, start: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        if not self._is_prepared:
            self._is_prepared = self._prepare_arguments(call.arguments)
        outer, self._is_stock_loop = self._is_stock_loop, start is _STOCK_START
        try:
            return start(*call.args, **call.kwargs)
        finally:
            self._is_stock_loop = outer

    def _prepare_arguments(self, arguments: dict[str, Any]) -> bool:
        """Inject the stored model and the planned rounds. Returns False if this start has no initial arrays."""
        records = [name for name, value in arguments.items() if isinstance(value, ArrayRecord)]
        name = (
            "initial_arrays" if "initial_arrays" in arguments else records[0] if len(records) == 1 else None
        )
        if name is None:
            return False
        rounds = arguments.get("num_rounds")
        left = self._rounds.begin_training(rounds if isinstance(rounds, int) else 0)
        if isinstance(rounds, int):
            arguments["num_rounds"] = left
        self._types = arguments[name] or ArrayRecord()
        self._binding = self._bind_model(from_record(self._types))
        if not self._is_injected and (left or not self._rounds.skipped):
            self._is_injected = True
            if self._binding.is_stored:
                arguments[name] = with_types_of(to_record(self._binding.initial), self._types)
        self._log.set_model(self._to_model(arguments[name] or ArrayRecord()))
        self.was_used = True
        self._evaluate = arguments.get("evaluate_fn")
        if self._evaluate is not None:
            arguments["evaluate_fn"] = self._wrap_evaluate(self._evaluate)
        return True

    def _take_result(self, result: Any) -> None:
        """Set the arrays of *result*, which an own `start` may have changed, as the global model, and end the round."""
        record = result.arrays if isinstance(result, Result) else result
        if isinstance(record, ArrayRecord) and record:
            self._log.set_model(self._to_model(record))
        self._log.end_round(self._rounds.current)

    def _complete_result(self, result: Any) -> Any:
        """Renumber the metrics of a resumed `start`, and give the model to one that was skipped as a whole."""
        skipped = self._rounds.skipped
        if not (skipped and isinstance(result, Result)):
            return result
        for name in _HISTORIES:
            by_round = getattr(result, name)
            setattr(result, name, {number + skipped: metrics for number, metrics in by_round.items()})
        result.arrays = result.arrays or with_types_of(to_record(self._binding.initial), self._types)
        return result

    def _to_model(self, record: ArrayRecord) -> Arrays:
        return self._binding.to_model(from_record(record))

    @contextmanager
    def _wrap_methods(self, strategy: Strategy) -> Iterator[None]:
        """Wrap the methods of *strategy* on the instance while `start` runs."""
        self._grid.checks_updates = has_arrays_of_the_model(strategy)
        streams = self._streaming and allows_streaming(strategy)
        wrapped = {
            "configure_train": self._wrap_configure_train(strategy, streams=streams),
            "configure_evaluate": self._wrap_configure_evaluate(strategy.configure_evaluate),
            "aggregate_train": self._wrap_aggregate_train(strategy.aggregate_train),
            "aggregate_evaluate": self._wrap_aggregate_evaluate(strategy.aggregate_evaluate),
        }
        if isinstance(strategy, FedAvg):
            wrapped[CHECK_REPLIES] = self._wrap_check(getattr(strategy, CHECK_REPLIES))
        overridden = {name: vars(strategy)[name] for name in wrapped if name in vars(strategy)}
        vars(strategy).update(wrapped)
        try:
            yield
        finally:
            for name in wrapped:
                vars(strategy).pop(name)
            vars(strategy).update(overridden)
            self._grid.checks_updates = False

    def _wrap_configure_train(self, strategy: Strategy, *, streams: bool) -> Callable[..., Any]:
        configure = strategy.configure_train

        def configure_train(server_round: int, arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
            self._log.set_model(self._to_model(arrays))
            self._log.end_round(self._rounds.current)
            app_round = server_round + self._rounds.skipped
            number = self._rounds.begin(app_round)
            self._log.trace.begin_round(number)
            self._grid.set_round(number)
            with self._grid.waiting_for_nodes():
                messages = configure(app_round, arrays, *args, **kwargs)
            messages = self._cohort.select_messages(self._watch_wait(messages), arrays)
            if self._modes is not None:
                return self._modes.train(messages, number, streams=streams)
            if not (streams and self._is_stock_loop):
                return messages
            if self._cohort.reads_updates or not isinstance(strategy, FedAvg):
                return StreamedMessages(messages)
            return SummableMessages(messages, weighted_by=strategy.weighted_by_key)

        return configure_train

    def _wrap_configure_evaluate(self, configure: Callable[..., Any]) -> Callable[..., Any]:
        def configure_evaluate(server_round: int, *args: Any, **kwargs: Any) -> Any:
            with self._grid.waiting_for_nodes():
                messages = configure(server_round + self._rounds.skipped, *args, **kwargs)
            messages = self._cohort.select_evaluation(self._watch_wait(messages))
            return messages if self._modes is None else self._modes.evaluate(messages)

        return configure_evaluate

    def _watch_wait(self, messages: Any) -> Any:
        """Return *messages*; if they are a generator, which runs later, it waits for nodes as `configure_…` does."""
        if not inspect.isgenerator(messages):
            return messages

        def generate() -> Iterator[Any]:
            with self._grid.waiting_for_nodes():
                yield from messages

        return generate()

    def _wrap_aggregate_train(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_train(server_round: int, replies: Any, *args: Any, **kwargs: Any) -> Any:
            with self._log.trace.aggregate_span(self._rounds.current):
                outcome = self._cohort.aggregate(
                    lambda observed: aggregate(
                        server_round + self._rounds.skipped, observed, *args, **kwargs
                    ),
                    replies,
                    round_number=self._rounds.current,
                    evaluate=self._evaluate,
                    round_log=self._log,
                )
            if self._modes is not None:
                self._log.set_aggregation(self._modes.report)
            arrays = _first_of(ArrayRecord, outcome)
            if arrays is not None:
                self._log.set_model(self._to_model(arrays))
            self._log.add_metrics(_first_of(MetricRecord, outcome), prefix="train_")
            return outcome

        return aggregate_train

    def _wrap_check(self, check: Callable[..., Any]) -> Callable[..., Any]:
        """Name the clients in a note of Flower's error about inconsistent replies. Its text stays as it is."""

        def check_replies(replies: Iterable[Message], *args: Any, **kwargs: Any) -> Any:
            received = list(replies)
            try:
                return check(received, *args, **kwargs)
            except InconsistentMessageReplies as error:
                error.add_note(describe_differences(received, self._grid.client_of))
                raise

        return check_replies

    def _wrap_aggregate_evaluate(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_evaluate(server_round: int, replies: Any, *args: Any, **kwargs: Any) -> Any:
            metrics = aggregate(server_round + self._rounds.skipped, replies, *args, **kwargs)
            self._log.add_metrics(_first_of(MetricRecord, metrics), prefix="eval_")
            return metrics

        return aggregate_evaluate

    def _wrap_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> Any:
            metrics = evaluate(server_round + self._rounds.skipped, arrays)
            self._log.add_metrics(_first_of(MetricRecord, metrics))
            return metrics

        return evaluate_fn


def _first_of(kind: type[T], outcome: object) -> T | None:
    """Return *outcome*, or the first of its items, that is a *kind*: an own strategy may return something else."""
    items: Iterable[object] = outcome if isinstance(outcome, tuple) else (outcome,)
    return next((item for item in items if isinstance(item, kind)), None)


def loaded_subclasses(base: type) -> list[Any]:
    """Return *base* and all its subclasses that are imported, sorted by name."""
    classes: set[type] = {base}
    unvisited: list[type] = [base]
    while unvisited:
        new: set[type] = set(unvisited.pop().__subclasses__()) - classes
        classes |= new
        unvisited += new
    return sorted(classes, key=lambda cls: cls.__qualname__)
