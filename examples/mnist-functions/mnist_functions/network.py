"""Three fully connected layers, 784 pixels → 128 → 64 → 10 digits, with their gradients, in NumPy."""

from itertools import pairwise

import numpy as np

Weights = dict[str, np.ndarray]

SIZES = (784, 128, 64, 10)
LAYERS = range(1, len(SIZES))


def make_weights(seed: int) -> Weights:
    """Return random weights, with the distribution that torch gives to a linear layer."""
    random = np.random.default_rng(seed)
    weights: Weights = {}
    for layer, (inputs, outputs) in zip(LAYERS, pairwise(SIZES), strict=True):
        limit = 1 / np.sqrt(inputs)
        weights[f"fc{layer}.weight"] = random.uniform(-limit, limit, (inputs, outputs)).astype(np.float32)
        weights[f"fc{layer}.bias"] = random.uniform(-limit, limit, outputs).astype(np.float32)
    return weights


def compute_logits(weights: Weights, inputs: np.ndarray) -> np.ndarray:
    """Return the scores (n, 10) of *inputs* (n, 784)."""
    return _forward(weights, inputs)[-1]


def compute_gradients(weights: Weights, inputs: np.ndarray, labels: np.ndarray) -> tuple[float, Weights]:
    """Return the mean cross-entropy loss, and its gradients by the names of the weights."""
    activations = _forward(weights, inputs)
    loss, error = cross_entropy(activations[-1], labels)
    gradients: Weights = {}
    for layer in reversed(LAYERS):
        gradients[f"fc{layer}.weight"] = activations[layer - 1].T @ error
        gradients[f"fc{layer}.bias"] = error.sum(axis=0)
        if layer > 1:
            error = (error @ weights[f"fc{layer}.weight"].T) * (activations[layer - 1] > 0)
    return loss, gradients


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean loss, and its gradient with respect to *logits*."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    gradient = np.exp(log_probabilities)
    gradient[rows, labels] -= 1
    return float(-log_probabilities[rows, labels].mean()), gradient / len(labels)


def _forward(weights: Weights, inputs: np.ndarray) -> list[np.ndarray]:
    """Return the inputs, and the outputs of each layer: of all but the last after ReLU."""
    activations = [inputs]
    for layer in LAYERS:
        outputs = activations[-1] @ weights[f"fc{layer}.weight"] + weights[f"fc{layer}.bias"]
        activations.append(np.maximum(outputs, 0) if layer < len(LAYERS) else outputs)
    return activations
