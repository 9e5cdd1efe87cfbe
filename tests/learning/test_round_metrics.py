"""One name for each figure, whatever the app calls it."""

import pytest

from fedbus.learning.round_metrics import normalize_metrics


@pytest.mark.parametrize(
    ("theirs", "ours"),
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
def test_common_names_become_one(theirs: str, ours: str) -> None:
    assert normalize_metrics({theirs: 0.5}) == {ours: 0.5}


def test_the_clients_figures_say_that_they_are_theirs() -> None:
    metrics = {"train_loss": 1, "accuracy": 0.5, "seconds": 2.0}
    assert normalize_metrics(metrics, prefix="train_") == {
        "train_loss": 1.0,
        "train_accuracy": 0.5,
        "train_seconds": 2.0,
    }
    assert normalize_metrics({"eval_f1": 1.0}, prefix="eval_") == {"eval_f1": 1.0}


def test_the_plainest_name_counts_and_what_is_no_number_is_left_out() -> None:
    assert normalize_metrics({"eval_loss": 2.0, "loss": 1.0, "list": [1.0], "flag": True}) == {"loss": 1.0}
