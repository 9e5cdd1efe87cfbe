"""One side of the simulation benchmark, in a process of its own.

    python -m benchmarks.simulation_sides SIDE CLIENTS WORKERS

It trains rounds of all clients, each when `simulation_turns` gets a turn.
"""

# ruff: noqa: ARG002, PLC0415, SLF001 - a side imports only what it needs, and implements interfaces of others

import os
import sys
from collections.abc import Callable
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any, Final

from benchmarks.simulation_turns import wait_for_turn
from fedbus.simulation.local.template import end_with_parent

APPS: Final = Path(__file__).parent / "simulation_apps"
MANY_ROUNDS: Final = 10_000


def run_fedbus(app: str, clients: int, workers: int) -> None:
    from fedbus.learning.installed_libraries import open_library
    from fedbus.simulation.observer import SilentObserver
    from fedbus.simulation.settings import SimulationSettings
    from fedbus.simulation.simulator import simulate
    from fedbus.stores.tasks.task_directory import read_task

    class RoundTurns(SilentObserver):
        def on_round(self, result: Any, model: Any) -> None:
            if result.round:
                wait_for_turn()

    simulate(
        SimulationSettings(
            task=read_task(APPS / app, open_library), clients=clients, workers=workers, rounds=MANY_ROUNDS
        ),
        RoundTurns(),
    )


def run_flower(app: str, clients: int, workers: int) -> None:
    from flwr.simulation import run_simulation

    sys.path.insert(0, str(APPS / app))
    os.environ["BENCH_TURNS"] = "1"
    client_app = __import__(f"{app}.client_app", fromlist=["app"]).app
    server_app = __import__(f"{app}.server_app", fromlist=["app"]).app

    server_app._main = call_with(server_app._main)
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": workers}},
    )


def call_with(main: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the main function of an app, to set the run configuration that ``flwr run`` would set."""

    def run(grid: Any, context: Any) -> Any:
        context.run_config.update({"num-server-rounds": MANY_ROUNDS, "lr": 0.01})
        return main(grid, context)

    return run


def run_torch(clients: int, workers: int) -> None:
    """Two plain processes, each of which trains its half of the clients; the updates are added up in each."""
    context = get_context("fork")
    links = []
    for number in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=train_share, args=(theirs, number, clients, workers), daemon=True)
        process.start()
        links.append(ours)
    from lenet_flower.task import LeNet

    weights = {name: tensor.numpy() for name, tensor in LeNet().state_dict().items()}
    while True:
        wait_for_turn()
        for link in links:
            link.send(weights)
        sums = [link.recv() for link in links]
        weights = {name: sum(one[name] for one in sums) / (clients * 32) for name in weights}


def train_share(link: Any, number: int, clients: int, workers: int) -> None:
    end_with_parent()
    import torch
    from lenet_flower.task import LeNet, load_data, train

    torch.set_num_threads(1)
    model = LeNet()
    while True:
        weights = {name: torch.from_numpy(array) for name, array in link.recv().items()}
        sums = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        for client in range(number, clients, workers):
            model.load_state_dict(weights)
            images, labels = load_data(client)
            train(model, images, labels, 0.01)
            for name, tensor in model.state_dict().items():
                sums[name].add_(tensor, alpha=len(images))
        link.send({name: tensor.numpy() for name, tensor in sums.items()})


def run_pfl(clients: int, workers: int) -> None:
    """As many processes of pfl as workers, each with its share of the clients: pfl runs a cohort in one process."""
    context = get_context("fork")
    links = []
    for number in range(workers):
        ours, theirs = context.Pipe()
        context.Process(target=run_pfl_share, args=(theirs, number, clients, workers), daemon=True).start()
        links.append(ours)
    for link in links:
        link.recv()
    while True:
        wait_for_turn()
        for link in links:
            link.send(None)
        for link in links:
            link.recv()


def run_pfl_share(link: Any, number: int, clients: int, workers: int) -> None:
    end_with_parent()
    current_process().name = "MainProcess"  # in other processes, pfl has no operations
    import numpy as np
    import torch
    from lenet_flower.task import LeNet, load_data
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from torch.nn import functional

    torch.set_num_threads(1)

    class Model(LeNet):
        def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.train()
            return functional.cross_entropy(self(images), labels)

        def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
            return {}

    class PflTurns(TrainingProcessCallback):
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            link.send(None)
            link.recv()
            return False, Metrics()

    module = Model()
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    own = list(range(number, clients, workers))
    state = {"next": 0}

    def next_user() -> int:
        state["next"] += 1
        return own[state["next"] % len(own)]

    data = FederatedDataset(lambda user: Dataset(raw_data=load_data(user)), next_user)
    backend = SimulatedBackend(training_data=data, val_data=None)
    np.random.seed(0)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=MANY_ROUNDS,
            evaluation_frequency=MANY_ROUNDS * 2,
            train_cohort_size=len(own),
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(local_batch_size=32, local_num_epochs=1, local_learning_rate=0.01),
        callbacks=[PflTurns()],
        send_metrics_to_platform=False,
    )


def main() -> None:
    side, clients, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, str(APPS / "lenet_flower"))
    sys.stdout.flush()
    os.dup2(2, 1)  # what apps print is not an answer
    match side.split(":"):
        case ["fedbus", app]:
            run_fedbus(app, clients, workers)
        case ["flower", app]:
            run_flower(app, clients, workers)
        case ["torch"]:
            run_torch(clients, workers)
        case ["pfl"]:
            run_pfl(clients, workers)


if __name__ == "__main__":
    main()
