"""The counterpart of `strategy_hook` for legacy apps: `flwr.server` apps with a `server_fn` or a workflow.

Legacy parameters are a list of tensors without names, arrays or bytes. The hook wraps both entries into legacy
training: `Server.fit`, and `DefaultWorkflow` (secure aggregation).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from flwr.common import Parameters
from flwr.server.server import Server
from flwr.server.workflow import DefaultWorkflow

from fedbus.learning.flower.array_records import BYTES_SUFFIX, from_parameters, to_parameters
from fedbus.learning.flower.model_binding import ModelBinding
from fedbus.learning.flower.node_polling import not_enough_clients
from fedbus.learning.flower.round_counter import RoundCounter
from fedbus.learning.flower.run_grid import RunGrid
from fedbus.learning.flower.strategy_hook import loaded_subclasses
from fedbus.learning.library import ModeUnsupported
from fedbus.learning.round_log import RoundLog
from fedbus.learning.weights import Arrays


class LegacyHook:
    """The hook for one call of a ServerApp. *bind_model* binds the app's arrays to the stored model.

    `was_used` is True if the app trained through a legacy entry.
    """

    def __init__(
        self,
        bind_model: Callable[[Arrays], ModelBinding],
        *,
        rounds: RoundCounter,
        recruit_s: float,
        log: RoundLog,
        grid: RunGrid,
    ) -> None:
        self._bind_model = bind_model
        self._rounds = rounds
        self._recruit_s = recruit_s
        self._log = log
        self._grid = grid
        self._binding: ModelBinding | None = None
        self._is_running = False
        self._is_injected = False
        """Whether a training has begun with the stored model."""
        self.was_used = False

    @contextmanager
    def install(self) -> Iterator[None]:
        """Wrap `Server.fit` and `DefaultWorkflow` until the block ends."""
        with ExitStack() as undo:
            for server_class in loaded_subclasses(Server):
                self._wrap_class(server_class, undo)

            def wrap_new_class(cls: type[Server], /, **options: Any) -> None:
                super(Server, cls).__init_subclass__(**options)
                self._wrap_class(cls, undo)

            undo.callback(delattr, Server, "__init_subclass__")
            Server.__init_subclass__ = classmethod(wrap_new_class)  # type: ignore[assignment, method-assign]
            undo.callback(setattr, DefaultWorkflow, "__call__", DefaultWorkflow.__call__)
            DefaultWorkflow.__call__ = self._wrap_workflow(DefaultWorkflow.__call__)  # type: ignore[method-assign]
            yield

    def _wrap_class(self, server_class: Any, undo: ExitStack) -> None:
        if "fit" in vars(server_class):
            undo.callback(setattr, server_class, "fit", server_class.fit)
            server_class.fit = self._wrap_fit(server_class.fit)

    def _wrap_fit(self, fit: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fit)
        def hooked(server: Server, *args: Any, **kwargs: Any) -> Any:
            if self._is_running:  # an overridden fit that calls the inherited one
                return fit(server, *args, **kwargs)
            self._check_mode()
            call = inspect.signature(fit).bind(server, *args, **kwargs)
            if "num_rounds" in call.arguments:
                call.arguments["num_rounds"] = self._rounds.begin_training(call.arguments["num_rounds"])
            with self._wrap_methods(server.strategy, server.client_manager()):
                return fit(*call.args, **call.kwargs)

        return hooked

    def _wrap_workflow(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def hooked(workflow: DefaultWorkflow, grid: Any, context: Any) -> Any:
            if self._is_running:
                return run(workflow, grid, context)
            self._check_mode()
            context.config.num_rounds = self._rounds.begin_training(context.config.num_rounds)
            with self._wrap_methods(context.strategy, context.client_manager):
                return run(workflow, grid, context)

        return hooked

    def _check_mode(self) -> None:
        if self._grid.training_refusal:
            raise ModeUnsupported(self._grid.training_refusal)

    @contextmanager
    def _wrap_methods(self, strategy: Any, client_manager: Any) -> Iterator[None]:
        """Wrap the methods of *strategy* and *client_manager* on the instances while the training runs."""
        self._is_running, self._binding, self.was_used = True, None, True
        wrapped = {
            "initialize_parameters": self._wrap_initialize(strategy.initialize_parameters),
            "configure_fit": self._wrap_configure(strategy.configure_fit),
            "configure_evaluate": self._wrap_shifted(strategy.configure_evaluate),
            "aggregate_fit": self._wrap_aggregate(strategy.aggregate_fit),
            "aggregate_evaluate": self._wrap_aggregate_evaluate(strategy.aggregate_evaluate),
            "evaluate": self._wrap_evaluate(strategy.evaluate),
        }
        overridden = {name: vars(strategy)[name] for name in wrapped if name in vars(strategy)}
        vars(strategy).update(wrapped)
        vars(client_manager)["wait_for"] = self._wrap_wait_for(client_manager)
        try:
            yield
            self._log.end_round(self._rounds.current)
        finally:
            for name in wrapped:
                vars(strategy).pop(name)
            vars(strategy).update(overridden)
            vars(client_manager).pop("wait_for")
            self._is_running = False
            self._log.trace.end_round()
            self._grid.set_round(None)

    def _wrap_initialize(self, initialize: Callable[..., Any]) -> Callable[..., Any]:
        def initialize_parameters(*args: Any, **kwargs: Any) -> Parameters | None:
            app_parameters: Parameters | None = initialize(*args, **kwargs)
            if self._is_injected:  # a second training of the app begins with its own parameters
                return app_parameters
            binding = self._bind_model(from_parameters(app_parameters) if app_parameters else {})
            self._is_injected = True
            if (
                app_parameters is not None or binding.is_stored
            ):  # else Flower asks a client for its parameters
                self._binding = binding
            if not binding.is_stored:
                return app_parameters
            tensor_type = app_parameters.tensor_type if app_parameters else "numpy.ndarray"
            return to_parameters(binding.initial, binding.initial, tensor_type=tensor_type)

        return initialize_parameters

    def _wrap_configure(self, configure: Callable[..., Any]) -> Callable[..., Any]:
        def configure_fit(server_round: int, parameters: Parameters, *args: Any, **kwargs: Any) -> Any:
            self._log.set_model(self._to_model(parameters))
            self._log.end_round(self._rounds.current)
            app_round = server_round + self._rounds.skipped
            number = self._rounds.begin(app_round)
            self._log.trace.begin_round(number)
            self._grid.set_round(number)
            return configure(app_round, parameters, *args, **kwargs)

        return configure_fit

    def _wrap_aggregate(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_fit(server_round: int, results: Any, failures: Any) -> Any:
            with self._log.trace.aggregate_span(self._rounds.current):
                parameters, metrics = aggregate(server_round + self._rounds.skipped, results, failures)
            if parameters is not None:
                self._log.set_model(self._to_model(parameters))
            self._log.add_metrics(metrics, prefix="train_")
            return parameters, metrics

        return aggregate_fit

    def _wrap_aggregate_evaluate(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_evaluate(server_round: int, results: Any, failures: Any) -> Any:
            loss, metrics = aggregate(server_round + self._rounds.skipped, results, failures)
            self._log.add_metrics({**(metrics or {}), "loss": loss}, prefix="eval_")
            return loss, metrics

        return aggregate_evaluate

    def _wrap_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate_and_log(server_round: int, *args: Any, **kwargs: Any) -> Any:
            result = evaluate(server_round + self._rounds.skipped, *args, **kwargs)
            if result is not None:
                loss, metrics = result
                self._log.add_metrics({**(metrics or {}), "loss": loss})
            return result

        return evaluate_and_log

    def _wrap_shifted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def shifted(server_round: int, *args: Any, **kwargs: Any) -> Any:
            return method(server_round + self._rounds.skipped, *args, **kwargs)

        return shifted

    def _wrap_wait_for(self, client_manager: Any) -> Callable[..., bool]:
        """Limit `ClientManager.wait_for` to the plan's recruiting time. Flower's default is a day."""
        wait_for: Callable[..., bool] = client_manager.wait_for

        def wait_with_limit(num_clients: int, timeout: float | None = None) -> bool:
            wait_s = min(self._recruit_s, self._recruit_s if timeout is None else timeout)
            if wait_for(num_clients, wait_s):
                return True
            if timeout is not None and timeout <= wait_s:  # the app's own limit
                return False
            present = [f"node {cid}" for cid in client_manager.all()]
            raise not_enough_clients(present, {}, wait_s)

        return wait_with_limit

    def _to_model(self, parameters: Parameters) -> Arrays:
        """Return the model of *parameters*: if they are as many as the initial ones, by position."""
        arrays = from_parameters(parameters)
        if self._binding is None:  # the parameters of a client
            self._binding = self._bind_model(arrays)
        names = list(self._binding.initial)
        if [_is_bytes(name) for name in names] == [_is_bytes(name) for name in arrays]:
            arrays = dict(zip(names, arrays.values(), strict=True))
        return self._binding.to_model(arrays)


def _is_bytes(name: str) -> bool:
    return name.endswith(BYTES_SUFFIX)
