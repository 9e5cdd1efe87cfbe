"""The counterpart of `strategy_hook` for legacy apps: `flwr.server` apps with a `server_fn` or a workflow.

Legacy parameters are a list of arrays without names, so they get the names of the stored model in its order.
The hook wraps both entries into legacy training: `Server.fit`, and `DefaultWorkflow` (secure aggregation).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from flwr.common import Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.server import Server
from flwr.server.workflow import DefaultWorkflow

from fedbus.learning.flower.node_polling import not_enough_clients
from fedbus.learning.flower.strategy_hook import loaded_subclasses
from fedbus.learning.round_log import RoundLog
from fedbus.learning.weights import ArchitectureMismatch, Arrays, first_difference


class LegacyHook:
    """The hook for one call of a ServerApp. `was_used` is True if the app trained through a legacy entry."""

    def __init__(
        self, model: Arrays, *, rounds: int, first_round: int, recruit_s: float, log: RoundLog
    ) -> None:
        self._model = model
        self._rounds = rounds
        self._offset = first_round - 1
        self._recruit_s = recruit_s
        self._log = log
        self._round = self._offset
        self.was_used = False

    @contextmanager
    def install(self) -> Iterator[None]:
        """Wrap `Server.fit` and `DefaultWorkflow` until the block ends."""
        with ExitStack() as undo:
            for server_class in loaded_subclasses(Server):
                if "fit" in vars(server_class):
                    undo.callback(setattr, server_class, "fit", server_class.fit)
                    server_class.fit = self._wrap_fit(server_class.fit)
            undo.callback(setattr, DefaultWorkflow, "__call__", DefaultWorkflow.__call__)
            DefaultWorkflow.__call__ = self._wrap_workflow(DefaultWorkflow.__call__)  # type: ignore[method-assign]
            yield

    def _wrap_fit(self, fit: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fit)
        def hooked(server: Server, num_rounds: int, timeout: float | None) -> Any:
            if self.was_used:
                return fit(server, num_rounds, timeout)
            with self._wrap_methods(server.strategy, server.client_manager()):
                return fit(server, self._rounds, timeout)

        return hooked

    def _wrap_workflow(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def hooked(workflow: DefaultWorkflow, grid: Any, context: Any) -> Any:
            if self.was_used:
                return run(workflow, grid, context)
            context.config.num_rounds = self._rounds
            with self._wrap_methods(context.strategy, context.client_manager):
                return run(workflow, grid, context)

        return hooked

    @contextmanager
    def _wrap_methods(self, strategy: Any, client_manager: Any) -> Iterator[None]:
        """Wrap the methods of *strategy* and *client_manager* on the instances while the training runs."""
        self.was_used = True
        wrapped = {
            "initialize_parameters": self._wrap_initialize(strategy.initialize_parameters),
            "configure_fit": self._wrap_configure(strategy.configure_fit),
            "configure_evaluate": self._wrap_round_offset(strategy.configure_evaluate),
            "aggregate_fit": self._wrap_aggregate(strategy.aggregate_fit),
            "aggregate_evaluate": self._wrap_aggregate_evaluate(strategy.aggregate_evaluate),
            "evaluate": self._wrap_evaluate(strategy.evaluate),
        }
        vars(strategy).update(wrapped)
        vars(client_manager)["wait_for"] = self._wrap_wait_for(client_manager)
        try:
            yield
        finally:
            for name in wrapped:
                vars(strategy).pop(name)
            vars(client_manager).pop("wait_for")
            self._log.trace.end_round()
        self._log.end_round(self._round)

    def _wrap_initialize(self, initialize: Callable[..., Any]) -> Callable[..., Any]:
        def initialize_parameters(client_manager: Any) -> Parameters:
            app_parameters = initialize(client_manager=client_manager)
            if app_parameters is not None and app_parameters.tensors:
                self._check_architecture(self._name_arrays(app_parameters))
            return ndarrays_to_parameters(list(self._model.values()))

        return initialize_parameters

    def _wrap_configure(self, configure: Callable[..., Any]) -> Callable[..., Any]:
        def configure_fit(server_round: int, parameters: Parameters, client_manager: Any) -> Any:
            self._log.set_model(self._name_arrays(parameters))
            self._log.end_round(self._round)
            self._round = server_round + self._offset
            self._log.trace.begin_round(self._round)
            return configure(server_round=self._round, parameters=parameters, client_manager=client_manager)

        return configure_fit

    def _wrap_aggregate(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_fit(server_round: int, results: Any, failures: Any) -> Any:
            with self._log.trace.aggregate_span(server_round + self._offset):
                parameters, metrics = aggregate(server_round + self._offset, results, failures)
            if parameters is not None:
                self._log.set_model(self._name_arrays(parameters))
            self._log.add_metrics(metrics, prefix="train_")
            return parameters, metrics

        return aggregate_fit

    def _wrap_aggregate_evaluate(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_evaluate(server_round: int, results: Any, failures: Any) -> Any:
            loss, metrics = aggregate(server_round + self._offset, results, failures)
            self._log.add_metrics({**(metrics or {}), "loss": loss}, prefix="eval_")
            return loss, metrics

        return aggregate_evaluate

    def _wrap_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate_and_log(server_round: int, parameters: Parameters) -> Any:
            result = evaluate(server_round + self._offset, parameters)
            if result is not None:
                loss, metrics = result
                self._log.add_metrics({**(metrics or {}), "loss": loss})
            return result

        return evaluate_and_log

    def _wrap_round_offset(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def shifted(server_round: int, **kwargs: Any) -> Any:
            return method(server_round=server_round + self._offset, **kwargs)

        return shifted

    def _wrap_wait_for(self, client_manager: Any) -> Callable[..., bool]:
        """Limit `ClientManager.wait_for` to the plan's recruiting time. Flower's default is a day."""
        wait_for: Callable[..., bool] = client_manager.wait_for

        def wait_with_limit(num_clients: int, timeout: float | None = None) -> bool:
            wait_s = min(self._recruit_s, self._recruit_s if timeout is None else timeout)
            if not wait_for(num_clients, wait_s):
                present = [f"node {cid}" for cid in client_manager.all()]
                raise not_enough_clients(present, {}, wait_s)
            return True

        return wait_with_limit

    def _name_arrays(self, parameters: Parameters) -> Arrays:
        arrays = parameters_to_ndarrays(parameters)
        if len(arrays) != len(self._model):
            raise ArchitectureMismatch(
                f"the app's parameters are {len(arrays)} arrays, but the stored model has {len(self._model)}"
            )
        return dict(zip(self._model, arrays, strict=True))

    def _check_architecture(self, app_arrays: Arrays) -> None:
        if difference := first_difference(app_arrays, self._model):
            raise ArchitectureMismatch(f"the stored model does not have the app's architecture: {difference}")
