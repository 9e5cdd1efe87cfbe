"""The functions that fedbus calls: `initial` and `evaluate_global` on the server, the others on a client."""

from dataclasses import dataclass

import numpy as np

from fedbus.learning.functions import proximal_gradient
from mnist_functions import data
from mnist_functions.network import Weights, compute_gradients, compute_logits, cross_entropy, make_weights

MOMENTUM = 0.9


@dataclass
class ClientData:
    """The data of one client: inputs (n, 784) float32, and labels (n,)."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def initial(config: dict) -> Weights:
    """Make the first global weights."""
    return make_weights(int(config["seed"]))


def load(partition_id: int, num_partitions: int, config: dict, captured: tuple | None) -> ClientData:
    """Load the client's partition, its part of the test set, and the captured data of the device."""
    folder = str(config["data"])
    inputs, labels = data.partition(
        partition_id,
        num_partitions,
        data=folder,
        alpha=float(config["alpha"]),
        max_samples=int(config["max-samples"]),
    )
    if captured is not None:
        inputs = np.concatenate([inputs, captured[0].astype(np.float32)])
        labels = np.concatenate([labels, captured[1].astype(np.int64)])
    return ClientData((inputs, labels), data.evaluation_set(folder, part=partition_id, of=num_partitions))


def train(weights: Weights, client: ClientData, config: dict) -> tuple[Weights, dict, int]:
    """Train with stochastic gradient descent; with the strategy fedprox, near the global weights."""
    inputs, labels = client.train
    lr, size, mu = float(config["lr"]), int(config["batch-size"]), float(config.get("proximal-mu", 0.0))
    velocity = {name: np.zeros_like(array) for name, array in weights.items()}
    random = np.random.default_rng()
    losses = []
    for _ in range(int(config["local-epochs"])):
        order = random.permutation(len(labels))
        losses = []
        for batch in (order[start : start + size] for start in range(0, len(order), size)):
            loss, gradients = compute_gradients(weights, inputs[batch], labels[batch])
            losses.append(loss * len(batch))
            if mu:
                proximal = proximal_gradient(weights, config["global-weights"], mu)
                gradients = {name: gradient + proximal[name] for name, gradient in gradients.items()}
            for name, gradient in gradients.items():
                velocity[name] *= MOMENTUM
                velocity[name] += gradient
                weights[name] -= lr * velocity[name]
    return weights, {"train_loss": sum(losses) / len(labels)}, len(labels)


def evaluate(weights: Weights, client: ClientData, config: dict) -> tuple[dict, int]:
    """Evaluate on the client's part of the test set."""
    inputs, labels = client.test
    loss, accuracy = compute_scores(weights, inputs, labels)
    return {"eval_loss": loss, "eval_accuracy": accuracy}, len(labels)


def evaluate_global(weights: Weights, config: dict) -> dict:
    """Evaluate the global weights on the whole test set, on the server."""
    loss, accuracy = compute_scores(weights, *data.evaluation_set(str(config["data"])))
    return {"loss": loss, "accuracy": accuracy}


def predict(weights: Weights, inputs: np.ndarray) -> np.ndarray:
    """Return the digit of each image."""
    return compute_logits(weights, inputs.reshape(len(inputs), -1)).argmax(axis=1)


def compute_scores(weights: Weights, inputs: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    logits = compute_logits(weights, inputs)
    return cross_entropy(logits, labels)[0], float((logits.argmax(axis=1) == labels).mean())
