"""Each metric has one name, whatever name the app uses."""

import pytest

from fedbus.learning.round_metrics import normalize_metrics


@pytest.mark.parametrize(
    ("app_name", "common_name"),
    [
        ("loss", "loss"),
        ("eval_loss", "loss"),
        ("centralized_loss", "loss"),
        ("val-loss", "loss"),
        ("acc", "accuracy"),
        ("Test Accuracy", "accuracy"),
        ("eval_acc", "accuracy"),
        ("proximal_loss", "proximal_loss"),
        ("f1", "f1"),
        ("lossy", "lossy"),
    ],
)
def test_an_app_name_becomes_the_common_name(app_name: str, common_name: str) -> None:
    assert normalize_metrics({app_name: 0.5}) == {common_name: 0.5}


def test_metrics_of_clients_have_a_prefix() -> None:
    metrics = {"train_loss": 1, "accuracy": 0.5, "seconds": 2.0}
    assert normalize_metrics(metrics, prefix="train_") == {
        "train_loss": 1.0,
        "train_accuracy": 0.5,
        "train_seconds": 2.0,
    }
    assert normalize_metrics({"eval_f1": 1.0}, prefix="eval_") == {"eval_f1": 1.0}


def test_the_shortest_name_wins_and_only_numbers_count() -> None:
    assert normalize_metrics({"eval_loss": 2.0, "loss": 1.0, "list": [1.0], "flag": True}) == {"loss": 1.0}
