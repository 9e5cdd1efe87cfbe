"""Cases of legacy apps: `flwr.client`, `flwr.server`, its strategies, workflows and history."""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from differential.cases import App, case, partition
from differential.recording import Unordered, observe
from flwr.app import ConfigRecord, Context
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common import (
    Code,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import (
    LegacyContext,
    Server,
    ServerAppComponents,
    ServerConfig,
    SimpleClientManager,
    strategy,
)
from flwr.server.criterion import Criterion
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

OK = Status(Code.OK, "")


class Trainer(NumPyClient):
    """Trains by adding 1 + the square of its number."""

    def __init__(self, context: Context) -> None:
        self.context_of_app, self.number = context, partition(context)

    def get_parameters(self, config: Any) -> Any:
        observe(self.context_of_app, get_parameters=config)
        return weights()

    def fit(self, parameters: Any, config: Any) -> Any:
        observe(self.context_of_app, fit=parameters, config=config)
        return (
            [array + 1 + self.number**2 for array in parameters],
            10 + 5 * self.number,
            {"train_loss": 1.0 + self.number},
        )

    def evaluate(self, parameters: Any, config: Any) -> Any:
        observe(self.context_of_app, evaluate=parameters, config=config)
        return (
            float(sum(array.mean() for array in parameters)),
            4 + self.number,
            {"accuracy": 0.25 * (1 + self.number)},
        )


def weights() -> list[Any]:
    return [np.asarray([[0.0, 0.5], [1.0, 1.5]], np.float32), np.asarray([1.0, 2.0], np.float32)]


def initial() -> Parameters:
    return ndarrays_to_parameters(weights())


def average(metrics: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    total = sum(number for number, _ in metrics)
    return {key: sum(number * values[key] for number, values in metrics) / total for key in metrics[0][1]}


def serve(app: App, make: Callable[[Context], Any], rounds: int = 2, **config: Any) -> None:
    """Run the strategy that *make* returns by a Server that observes its history and final parameters."""

    class ObservingServer(Server):
        def __init__(self, context: Context) -> None:
            super().__init__(client_manager=SimpleClientManager(), strategy=make(context))
            self._context = context

        def fit(self, num_rounds: int, timeout: float | None) -> Any:
            outcome = super().fit(num_rounds, timeout)
            observe(self._context, history=outcome[0], parameters=self.parameters)
            return outcome

    def server_fn(context: Context) -> ServerAppComponents:
        return ServerAppComponents(
            server=ObservingServer(context), config=ServerConfig(num_rounds=rounds, **config)
        )

    app.server = ServerApp(server_fn=server_fn)


def train(app: App, client: Callable[[Context], Client | NumPyClient] = Trainer, **options: Any) -> None:
    app.client = ClientApp(client_fn=lambda context: client(context).to_client(), **options)


METRICS: dict[str, Any] = {"fit_metrics_aggregation_fn": average, "evaluate_metrics_aggregation_fn": average}
OPT: dict[str, Any] = {"eta": 0.1, "tau": 0.01}
STOCK: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "FedAvg": (strategy.FedAvg, METRICS, 2),
    "FedProx": (strategy.FedProx, {"proximal_mu": 0.25}, 2),
    "FedAvgM": (strategy.FedAvgM, {"server_momentum": 0.9, "server_learning_rate": 0.5}, 2),
    "FedAdam": (strategy.FedAdam, OPT, 2),
    "FedAdagrad": (strategy.FedAdagrad, OPT, 2),
    "FedYogi": (strategy.FedYogi, OPT, 2),
    "FedMedian": (strategy.FedMedian, {}, 3),
    "FedTrimmedAvg": (strategy.FedTrimmedAvg, {"beta": 0.25}, 4),
    "Krum": (strategy.Krum, {"num_malicious_clients": 1}, 5),
    "Bulyan": (strategy.Bulyan, {"num_malicious_clients": 1}, 7),
    "QFedAvg": (
        strategy.QFedAvg,
        {"q_param": 0.2, "qffl_learning_rate": 0.1, "evaluate_fn": lambda *_: (2.0, {})},
        2,
    ),
    "FaultTolerantFedAvg": (strategy.FaultTolerantFedAvg, {}, 2),
}
for stock_name, (stock_strategy, stock_options, stock_clients) in STOCK.items():
    case(f"legacy {stock_name} runs for two rounds", name=f"legacy_{stock_name}", clients=stock_clients)(
        lambda app, make=stock_strategy, options=stock_options: (  # type: ignore[misc]  # mypy infers no type for a lambda with a default
            train(app),
            serve(app, lambda context: make(initial_parameters=initial(), **options)),
        )
    )


@case("legacy clipping on the server")
def legacy_dp_server(app: App) -> None:
    train(app)
    base = lambda: strategy.FedAvg(initial_parameters=initial())  # noqa: E731
    serve(app, lambda context: strategy.DifferentialPrivacyServerSideFixedClipping(base(), 0.0, 0.5, 2))


@case("legacy clipping on the clients, with its mod")
def legacy_dp_client(app: App) -> None:
    train(app, mods=[fixedclipping_mod])
    base = lambda: strategy.FedAvg(initial_parameters=initial(), fraction_evaluate=0.0)  # noqa: E731
    serve(app, lambda context: strategy.DifferentialPrivacyClientSideFixedClipping(base(), 0.0, 0.5, 2))


@case("functions of the app configure rounds and evaluate centrally")
def legacy_functions(app: App) -> None:
    train(app)

    def make(context: Context) -> Any:
        def evaluate(server_round: int, parameters: Any, config: Any) -> Any:
            observe(context, evaluates=server_round, parameters=parameters, config=config)
            return 10.0 - server_round, {"accuracy": 0.1 * server_round}

        return strategy.FedAvg(
            initial_parameters=initial(),
            on_fit_config_fn=lambda number: {"round": number, "lr": 0.5 / number},
            on_evaluate_config_fn=lambda number: {"round": number, "batch": 8},
            evaluate_fn=evaluate,
            **METRICS,
        )

    serve(app, make, rounds=3)


@case("without initial parameters a client is asked for them")
def parameters_of_a_client(app: App) -> None:
    class ParametersTrainer(Trainer):
        def get_parameters(self, config: Any) -> Any:
            return weights()

    train(app, ParametersTrainer)
    serve(app, lambda context: strategy.FedAvg(**METRICS))


@case("the parameters may be bytes, which grow")
def parameters_of_bytes(app: App) -> None:
    class Trees(Client):
        def __init__(self, context: Context) -> None:
            self.context_of_app = context

        def fit(self, ins: FitIns) -> FitRes:
            observe(self.context_of_app, got=ins.parameters)
            return FitRes(OK, Parameters([b'{"tree": 1}'], ""), 10, {})

    class Joins(strategy.FedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            blobs = [result.parameters.tensors[0] for _, result in results]
            return Parameters([b"[" * server_round + b", ".join(sorted(blobs))], ""), {}

    train(app, Trees)
    serve(app, lambda context: Joins(initial_parameters=Parameters([], ""), fraction_evaluate=0.0), rounds=3)


def _booster(leaf: int) -> bytes:
    model = {
        "gbtree_model_param": {"num_trees": "1", "num_parallel_tree": "1"},
        "iteration_indptr": [0, 1],
        "trees": [{"id": 0, "leaf": leaf}],
        "tree_info": [0],
    }
    return json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()


class Booster(Client):
    def __init__(self, context: Context) -> None:
        self.context_of_app = context

    def fit(self, ins: FitIns) -> FitRes:
        observe(self.context_of_app, tensors=len(ins.parameters.tensors), config=ins.config)
        return FitRes(OK, Parameters([_booster(7)], ""), 10, {})

    def evaluate(self, ins: Any) -> EvaluateRes:
        observe(self.context_of_app, evaluates=ins.parameters)
        return EvaluateRes(OK, 0.5, 3, {"auc": 0.75})


@case("legacy FedXgbBagging puts trees together")
def legacy_FedXgbBagging(app: App) -> None:  # noqa: N802
    train(app, Booster)
    serve(app, lambda context: strategy.FedXgbBagging(initial_parameters=Parameters([], "")), rounds=3)


@case("legacy FedXgbCyclic trains on one client in each round")
def legacy_FedXgbCyclic(app: App) -> None:  # noqa: N802
    class Grows(Booster):
        def fit(self, ins: FitIns) -> FitRes:
            got = ins.parameters.tensors[0] if ins.parameters.tensors else b""
            return FitRes(OK, Parameters([got + b"+"], ""), 10, {})

        def evaluate(self, ins: Any) -> EvaluateRes:
            return EvaluateRes(OK, 0.5, 3, {"auc": 0.75})

    class FirstClientsManager(SimpleClientManager):
        def sample(self, num_clients: int, min_num_clients: int | None = None, criterion: Any = None) -> Any:
            self.wait_for(min_num_clients or num_clients)
            return sorted(self.all().values(), key=lambda proxy: proxy.cid)[:num_clients]

    train(app, Grows)

    def server_fn(context: Context) -> ServerAppComponents:
        chosen = strategy.FedXgbCyclic(
            initial_parameters=Parameters([], ""), fraction_fit=1.0, min_fit_clients=2
        )
        chosen.evaluate = lambda number, parameters: observe(context, number=number, parameters=parameters)
        return ServerAppComponents(
            strategy=chosen, config=ServerConfig(num_rounds=3), client_manager=FirstClientsManager()
        )

    app.server = ServerApp(server_fn=server_fn)


@case("a client that fails is a failure of the round", clients=3)
def legacy_failing_client(app: App) -> None:
    class Fails(Trainer):
        def fit(self, parameters: Any, config: Any) -> Any:
            if self.number == 1:
                raise RuntimeError("no memory")
            return super().fit(parameters, config)

    class ObservingStrategy(strategy.FedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            assert self.context_of_app
            observe(
                self.context_of_app,
                results=len(results),
                failures=[type(failure).__name__ for failure in failures],
            )
            return super().aggregate_fit(server_round, results, failures)

    def make(context: Context) -> Any:
        chosen = ObservingStrategy(initial_parameters=initial(), min_fit_clients=3, min_available_clients=3)
        chosen.context_of_app = context
        return chosen

    train(app, Fails)
    serve(app, make)


@case("a status that is not OK is a failure; without accepting failures the model stays")
def legacy_status(app: App) -> None:
    class Declines(Client):
        def __init__(self, context: Context) -> None:
            self.number = partition(context)

        def get_parameters(self, ins: Any) -> GetParametersRes:
            return GetParametersRes(OK, initial())

        def fit(self, ins: FitIns) -> FitRes:
            status = OK if self.number else Status(Code.FIT_NOT_IMPLEMENTED, "not today")
            grown = [array + 1 for array in parameters_to_ndarrays(ins.parameters)]
            return FitRes(status, ndarrays_to_parameters(grown), 5, {"x": 1.0})

        def evaluate(self, ins: Any) -> EvaluateRes:
            return EvaluateRes(
                OK if self.number else Status(Code.EVALUATE_NOT_IMPLEMENTED, ""), 2.0, 5, {"y": 1.0}
            )

    train(app, Declines)
    serve(
        app, lambda context: strategy.FedAvg(initial_parameters=initial(), accept_failures=False, **METRICS)
    )


@case("a strategy may ask for the properties of its clients")
def legacy_properties(app: App) -> None:
    class Knows(Trainer):
        def get_properties(self, config: Any) -> Any:
            observe(self.context_of_app, asked=config)
            return {"rows": 100 + self.number, "name": "x", "flag": True}

    class Asks(strategy.FedAvg):
        def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
            chosen = super().configure_fit(server_round, parameters, client_manager)
            answers = [
                proxy.get_properties(GetPropertiesIns({"q": 1}), timeout=20.0, group_id=5)
                for proxy, _ in chosen
            ]
            assert all(isinstance(answer, GetPropertiesRes) for answer in answers)
            observe(self.context_of_app, properties=Unordered([answer.properties for answer in answers]))
            return chosen

    def make(context: Context) -> Any:
        chosen = Asks(initial_parameters=initial())
        chosen.context_of_app = context
        return chosen

    train(app, Knows)
    serve(app, make, rounds=1)


@case("a client may keep state in its context")
def legacy_client_state(app: App) -> None:
    class Counts(Trainer):
        def fit(self, parameters: Any, config: Any) -> Any:
            state = self.get_context().state
            counts = state.get("counts") or ConfigRecord({"n": 0})
            counts["n"] += 1
            state["counts"] = counts
            observe(self.context_of_app, state=state)
            return super().fit(parameters, config)

    train(app, Counts)
    serve(app, lambda context: strategy.FedAvg(initial_parameters=initial()), rounds=3)


@case("a client_fn of the old signature gets the number of its partition")
def legacy_client_fn(app: App) -> None:
    class Plain(NumPyClient):
        def __init__(self, cid: str) -> None:
            self.cid = cid

        def fit(self, parameters: Any, config: Any) -> Any:
            return [array + int(self.cid) for array in parameters], 1, {"cid": float(self.cid)}

        def evaluate(self, parameters: Any, config: Any) -> Any:
            return float(self.cid), 1, {}

    def client_fn(cid: str) -> Client:
        return Plain(cid).to_client()

    app.client = ClientApp(client_fn=client_fn)  # type: ignore[arg-type]  # the legacy signature
    serve(
        app, lambda context: strategy.FedAvg(initial_parameters=initial(), fit_metrics_aggregation_fn=average)
    )


@case("a strategy may sample by a criterion", clients=3)
def legacy_criterion(app: App) -> None:
    class Even(Criterion):
        def select(self, client: Any) -> bool:
            return True

    class Samples(strategy.FedAvg):
        def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
            chosen = client_manager.sample(3, 3, Even())
            observe(self.context_of_app, sampled=len(chosen), available=client_manager.num_available())
            return [(proxy, FitIns(parameters, {"n": 1})) for proxy in chosen]

    def make(context: Context) -> Any:
        chosen = Samples(initial_parameters=initial(), min_available_clients=3)
        chosen.context_of_app = context
        return chosen

    train(app)
    serve(app, make)


@case("the default of a ServerConfig is one round; without a strategy it is FedAvg")
def legacy_defaults(app: App) -> None:
    class DefaultsTrainer(Trainer):
        def get_parameters(self, config: Any) -> Any:
            return weights()

    train(app, DefaultsTrainer)
    app.server = ServerApp(server_fn=lambda context: ServerAppComponents())


@case("a round's timeout is the time to live of its messages", slow=True)
def legacy_round_timeout(app: App) -> None:
    class Slow(Trainer):
        def fit(self, parameters: Any, config: Any) -> Any:
            import time

            time.sleep(4.0 * self.number)
            return super().fit(parameters, config)

    train(app, Slow)
    chosen = lambda context: strategy.FedAvg(initial_parameters=initial(), fraction_evaluate=0.0)  # noqa: E731
    serve(app, chosen, rounds=1, round_timeout=2.0)


# --- workflows --------------------------------------------------------------------------------


def work(app: App, make: Callable[[], Any], workflow: Callable[[], DefaultWorkflow], rounds: int = 2) -> None:
    """Run a workflow in the main function, and observe the legacy context."""

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        random.seed(0)
        legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=rounds), strategy=make())
        workflow()(grid, legacy)
        history = legacy.history
        observe(context, losses=history.losses_distributed, metrics=history.metrics_distributed)
        observe(context, fit=history.metrics_distributed_fit, records=sorted(legacy.state))
        observe(context, final=legacy.state.array_records["parameters"])


@case("the default workflow runs a strategy")
def default_workflow(app: App) -> None:
    train(app)
    work(app, lambda: strategy.FedAvg(initial_parameters=initial(), **METRICS), DefaultWorkflow)


@case("SecAgg+ gives the sum, and no update of a client", clients=3)
def secagg_plus(app: App) -> None:
    class Same(Trainer):
        def fit(self, parameters: Any, config: Any) -> Any:
            return [array + 1 for array in parameters], 5, {}

    train(app, Same, mods=[secaggplus_mod])

    def workflow() -> DefaultWorkflow:
        return DefaultWorkflow(
            fit_workflow=SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2, timeout=30.0)
        )

    class Rounded(strategy.FedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            parameters, metrics = super().aggregate_fit(server_round, results, failures)
            rounded = [np.round(array, 2) for array in parameters_to_ndarrays(parameters)]
            return ndarrays_to_parameters(rounded), metrics

    options: dict[str, Any] = {"min_fit_clients": 3, "min_available_clients": 3, "fraction_evaluate": 0.0}
    work(app, lambda: Rounded(initial_parameters=initial(), **options), workflow)
