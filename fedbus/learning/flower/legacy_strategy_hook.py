"""Around the training of legacy apps (`server_fn`, workflows): what strategy_hook is for the newer ones.

Legacy parameters are a list of arrays without names, so the stored model's order names them. Both
ways into legacy training are wrapped: `Server.fit`, and `DefaultWorkflow` (secure aggregation).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from flwr.common import Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.server import Server
from flwr.server.workflow import DefaultWorkflow

from fedbus.learning.flower.node_polling import NotEnoughClients
from fedbus.learning.flower.round_log import RoundLog
from fedbus.learning.flower.strategy_hook import loaded_subclasses
from fedbus.learning.weights import ArchitectureMismatch, Arrays, first_difference


class LegacyHook:
    """For one call of the ServerApp. *used* says whether it trained in a legacy way."""

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
        with ExitStack() as undo:
            for kind in loaded_subclasses(Server):
                if "fit" in vars(kind):
                    undo.callback(setattr, kind, "fit", kind.fit)
                    kind.fit = self._wrap_fit(kind.fit)
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

    def _wrap_workflow(self, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def hooked(workflow: DefaultWorkflow, grid: Any, context: Any) -> Any:
            if self.was_used:
                return work(workflow, grid, context)
            context.config.num_rounds = self._rounds
            with self._wrap_methods(context.strategy, context.client_manager):
                return work(workflow, grid, context)

        return hooked

    @contextmanager
    def _wrap_methods(self, strategy: Any, clients: Any) -> Iterator[None]:
        """Methods of the strategy's own, in front of those of its class, while the training runs."""
        self.was_used = True
        watched = {
            "initialize_parameters": self._wrap_initialize(strategy.initialize_parameters),
            "configure_fit": self._wrap_configure(strategy.configure_fit),
            "configure_evaluate": self._wrap_round_offset(strategy.configure_evaluate),
            "aggregate_fit": self._wrap_aggregate(strategy.aggregate_fit),
            "aggregate_evaluate": self._wrap_aggregate_evaluate(strategy.aggregate_evaluate),
            "evaluate": self._wrap_evaluate(strategy.evaluate),
        }
        vars(strategy).update(watched)
        vars(clients)["wait_for"] = self._wrap_wait_for(clients)
        try:
            yield
        finally:
            for name in watched:
                vars(strategy).pop(name)
            vars(clients).pop("wait_for")
            self._log.trace.ends()
        self._log.ended(self._round)

    def _wrap_initialize(self, initialise: Callable[..., Any]) -> Callable[..., Any]:
        def initialize_parameters(client_manager: Any) -> Parameters:
            own = initialise(client_manager=client_manager)
            if own is not None and own.tensors:
                self._check_architecture(self._name_arrays(own))
            return ndarrays_to_parameters(list(self._model.values()))

        return initialize_parameters

    def _wrap_configure(self, configure: Callable[..., Any]) -> Callable[..., Any]:
        def configure_fit(server_round: int, parameters: Parameters, client_manager: Any) -> Any:
            self._log.set_model(self._name_arrays(parameters))
            self._log.ended(self._round)
            self._round = server_round + self._offset
            self._log.trace.begins(self._round)
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
        def evaluated(server_round: int, parameters: Parameters) -> Any:
            found = evaluate(server_round + self._offset, parameters)
            if found is not None:
                loss, metrics = found
                self._log.add_metrics({**(metrics or {}), "loss": loss})
            return found

        return evaluated

    def _wrap_round_offset(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def shifted(server_round: int, **kwargs: Any) -> Any:
            return method(server_round=server_round + self._offset, **kwargs)

        return shifted

    def _wrap_wait_for(self, clients: Any) -> Callable[..., bool]:
        """Flower's client manager waits a day for clients; the plan says how long it may be."""
        wait_for: Callable[..., bool] = clients.wait_for

        def wait_as_planned(num_clients: int, timeout: float | None = None) -> bool:
            wait_s = min(self._recruit_s, self._recruit_s if timeout is None else timeout)
            if not wait_for(num_clients, wait_s):
                present = [f"node {cid}" for cid in clients.all()]
                raise NotEnoughClients(present, {}, wait_s)
            return True

        return wait_as_planned

    def _name_arrays(self, parameters: Parameters) -> Arrays:
        arrays = parameters_to_ndarrays(parameters)
        if len(arrays) != len(self._model):
            raise ArchitectureMismatch(
                f"the app's parameters are {len(arrays)} arrays and the stored model has {len(self._model)}"
            )
        return dict(zip(self._model, arrays, strict=True))

    def _check_architecture(self, own: Arrays) -> None:
        if difference := first_difference(own, self._model):
            raise ArchitectureMismatch(f"the stored model is not of the app's architecture: {difference}")
