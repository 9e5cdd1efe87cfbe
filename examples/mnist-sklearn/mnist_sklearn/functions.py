"""The functions that fedbus calls. The weights are the classifier's ``coef_`` and ``intercept_``."""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import log_loss

from mnist_sklearn import data

Weights = dict[str, np.ndarray]

CLASSES = np.arange(10)
PIXELS = 784


@dataclass
class ClientData:
    """The data of one client: inputs (n, 784) float32, and labels (n,)."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def initial(config: dict) -> Weights:
    """Make the first global weights."""
    return {
        "coef": np.zeros((len(CLASSES), PIXELS), np.float32),
        "intercept": np.zeros(len(CLASSES), np.float32),
    }


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
    """Train one or more epochs with `partial_fit`, from the global weights."""
    inputs, labels = client.train
    classifier = make_classifier(weights, lr=float(config["lr"]), alpha=float(config["l2"]))
    random = np.random.default_rng()
    for _ in range(int(config["local-epochs"])):
        order = random.permutation(len(labels))
        classifier.partial_fit(inputs[order], labels[order])
    loss = log_loss(labels, classifier.predict_proba(inputs), labels=CLASSES)
    return {"coef": classifier.coef_, "intercept": classifier.intercept_}, {"train_loss": loss}, len(labels)


def evaluate(weights: Weights, client: ClientData, config: dict) -> tuple[dict, int]:
    """Evaluate on the client's part of the test set."""
    inputs, labels = client.test
    classifier = make_classifier(weights)
    loss = log_loss(labels, classifier.predict_proba(inputs), labels=CLASSES)
    return {"eval_loss": loss, "eval_accuracy": classifier.score(inputs, labels)}, len(labels)


def predict(weights: Weights, inputs: np.ndarray) -> np.ndarray:
    """Return the digit of each image."""
    return make_classifier(weights).predict(inputs.reshape(len(inputs), -1))


def make_classifier(weights: Weights, *, lr: float = 0.01, alpha: float = 1e-4) -> SGDClassifier:
    """Make a classifier with *weights*, as if it had been trained."""
    classifier = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=lr, alpha=alpha)
    classifier.partial_fit(np.zeros((len(CLASSES), PIXELS), np.float32), CLASSES, classes=CLASSES)
    classifier.coef_, classifier.intercept_ = weights["coef"], weights["intercept"]
    return classifier
