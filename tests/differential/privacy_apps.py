"""Cases of privacy: differential privacy with seeded noise, and secure aggregation with clients that drop out."""

from collections.abc import Callable
from typing import Any

import numpy as np
from differential.app_apps import ask
from differential.cases import App, add_trainer, arrays, case, partition
from differential.legacy_apps import Trainer, initial, train, work
from differential.strategy_parts import start, train_only
from flwr.app import Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.server import strategy
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

# --- differential privacy ---------------------------------------------------------------------

NOISE = 0.7
WITH_NOISE: dict[str, tuple[Callable[[], Strategy], list[Any]]] = {
    "server_fixed": (lambda: DifferentialPrivacyServerSideFixedClipping(train_only(), NOISE, 0.5, 2), []),
    "server_adaptive": (lambda: DifferentialPrivacyServerSideAdaptiveClipping(train_only(), NOISE, 2), []),
    "client_fixed": (
        lambda: DifferentialPrivacyClientSideFixedClipping(train_only(), NOISE, 0.5, 2),
        [fixedclipping_mod],
    ),
    "client_adaptive": (
        lambda: DifferentialPrivacyClientSideAdaptiveClipping(train_only(), NOISE, 2),
        [adaptiveclipping_mod],
    ),
}


def _register(app: App, make: Callable[[], Strategy], mods: list[Any]) -> None:
    app.client = ClientApp(mods=mods)
    add_trainer(app)

    def seeded() -> Strategy:
        np.random.seed(7)  # Flower draws noise from the global generator, in the process of the ServerApp
        return make()

    start(app, seeded, num_rounds=3)


for dp_name, (dp_strategy, dp_mods) in WITH_NOISE.items():
    case(f"differential privacy with noise: {dp_name}", name=f"DP_noise_{dp_name}")(
        lambda app, make=dp_strategy, mods=dp_mods: _register(app, make, mods)  # type: ignore[misc]  # mypy infers no type for a lambda with a default
    )


@case("LocalDpMod adds the noise of the client's generator", clients=1)
def local_dp_noise(app: App) -> None:
    def seed(message: Message, context: Context, call_next: Any) -> Message:
        np.random.seed(7)
        reply: Message = call_next(message, context)
        return reply

    app.client = ClientApp(
        mods=[seed, LocalDpMod(clipping_norm=0.5, sensitivity=0.1, epsilon=1.0, delta=0.1)]
    )
    add_trainer(app)
    ask(app, "train", content=lambda: RecordDict({"arrays": arrays()}))


# --- secure aggregation -----------------------------------------------------------------------


class RoundedFedAvg(strategy.FedAvg):
    """FedAvg that rounds the parameters to the precision of the quantization."""

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        if parameters is None:
            return parameters, metrics
        rounded = [np.round(array, 2) for array in parameters_to_ndarrays(parameters)]
        return ndarrays_to_parameters(rounded), metrics


class FailingTrainer(Trainer):
    """A trainer of which number 3 fails in the first round, after it has shared its keys."""

    def fit(self, parameters: Any, config: Any) -> Any:
        if self.number == 3 and float(parameters[0].sum()) == 3.0:
            raise RuntimeError("the device is switched off")
        return [array + 0.5 * self.number for array in parameters], 10 + self.number, {}


def _secagg() -> DefaultWorkflow:
    return DefaultWorkflow(
        fit_workflow=SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.5, timeout=30.0)
    )


OPTIONS: dict[str, Any] = {"min_fit_clients": 4, "min_available_clients": 4, "fraction_evaluate": 0.0}


@case("SecAgg+ without a client that drops out after it has shared its keys", clients=4)
def secagg_dropout_in_training(app: App) -> None:
    train(app, FailingTrainer, mods=[secaggplus_mod])
    work(app, lambda: RoundedFedAvg(initial_parameters=initial(), **OPTIONS), _secagg)


def _drop_out(stage: str) -> Callable[[App], None]:
    def register(app: App) -> None:
        def fails(message: Message, context: Context, call_next: Any) -> Message:
            config: Any = message.content.config_records.get(RECORD_KEY_CONFIGS, {})
            if partition(context) == 3 and config.get(Key.STAGE) == stage:
                raise RuntimeError("the device is switched off")
            reply: Message = call_next(message, context)
            return reply

        train(app, mods=[fails, secaggplus_mod])
        work(app, lambda: RoundedFedAvg(initial_parameters=initial(), **OPTIONS), _secagg)

    return register


for secagg_stage in (Stage.SETUP, Stage.SHARE_KEYS, Stage.UNMASK):
    case(
        f"SecAgg+ with a client that drops out in stage {secagg_stage}",
        name=f"secagg_{secagg_stage}",
        clients=4,
    )(_drop_out(secagg_stage))
