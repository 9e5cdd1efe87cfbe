"""Checks of captured rows; their texts contain no value of a sample."""

from typing import Any

import numpy as np
import pytest

from fedbus.contracts.serving import DataCheckResult, LiveAccuracy
from fedbus.contracts.task.serving import ChecksTable
from fedbus.domain.data_checks import (
    check_data,
    count_classes,
    derive_expectation,
    measure_live_accuracy,
    restrict_classes,
)

INPUTS = np.random.default_rng(0).random((100, 3), dtype=np.float32)
LABELS = np.arange(100) % 4


def run_checks(
    inputs: np.ndarray[Any, Any] = INPUTS, labels: list[Any] | None = None, **table: Any
) -> dict[str, DataCheckResult]:
    checks = ChecksTable.model_validate({name.replace("_", "-"): value for name, value in table.items()})
    truth: list[Any] = LABELS.tolist() if labels is None else labels
    return {
        one.check: one
        for one in check_data(inputs, truth, derive_expectation(checks, INPUTS, LABELS), checks)
    }


def test_data_like_the_reference_pass() -> None:
    assert {name: one.ok for name, one in run_checks().items()} == dict.fromkeys(
        ("schema", "range", "balance", "labels"), True
    )


@pytest.mark.parametrize(
    ("inputs", "what"),
    [(np.zeros((100, 4), np.float32), r"[4]"), (np.zeros((100, 3), np.float64), "float64")],
    ids=["shape", "dtype"],
)
def test_another_shape_or_dtype_violates_the_schema(inputs: np.ndarray[Any, Any], what: str) -> None:
    schema = run_checks(inputs)["schema"]
    assert not schema.ok
    assert what in schema.what


def test_a_label_that_is_not_a_class_violates_the_schema() -> None:
    schema = run_checks(labels=[9, 1.5, *LABELS.tolist()[2:]])["schema"]
    assert (schema.ok, schema.value) == (False, 0.02)


def test_rows_out_of_range_are_counted_and_not_quoted() -> None:
    inputs = INPUTS.copy()
    inputs[:7, 1] = 123.456
    outside = run_checks(inputs)["range"]
    assert (outside.ok, outside.value) == (False, 0.07)
    assert "123" not in outside.what
    assert not run_checks(maximum=0.5)["range"].ok


def test_a_class_that_is_too_rare_fails_the_balance_check() -> None:
    balance = run_checks(labels=[0] * 97 + [1, 2, 3], min_class_share=0.05)["balance"]
    assert (balance.ok, balance.value) == (False, 0.01)
    assert not run_checks(classes=5, min_class_share=0.05)["balance"].ok


def test_rows_without_a_label_are_counted() -> None:
    labels = run_checks(labels=[None] * 60 + [1] * 40, max_unlabelled_share=0.5)["labels"]
    assert (labels.ok, labels.value) == (False, 0.6)


def test_without_rows_there_are_no_results() -> None:
    assert run_checks(INPUTS[:0], []) == {}


def test_other_labels_are_counted_together() -> None:
    labels: list[Any] = [1, 1, 3.0, None, [0.5, 0.5], 0.25, 52000]
    assert count_classes(labels, frozenset(range(4))) == {"1": 2, "3": 1, "other": 3}
    assert count_classes(labels, None) == {}


CLASS_NUMBERS, LOGITS = np.arange(9), np.zeros((9, 4), np.float32)
AMOUNTS = np.linspace(0, 1, 9, dtype=np.float32)


@pytest.mark.parametrize(
    ("outputs", "reference", "declared", "classes"),
    [
        (CLASS_NUMBERS, [1, 2, 7], None, {1, 2, 7}),
        (LOGITS, [1, 2, 3], None, {1, 2, 3}),
        (LOGITS, None, None, {0, 1, 2, 3}),
        (AMOUNTS, [0, 1], None, {0, 1}),
        (AMOUNTS, [18, 43], None, None),
        (AMOUNTS[:, None], [18, 43], None, None),
        (AMOUNTS, [18, 43], 3, {0, 1, 2}),
        (CLASS_NUMBERS, [48999, 61234], None, None),
        (CLASS_NUMBERS, None, None, None),
    ],
)
def test_labels_are_classes_if_declared_or_predicted(
    outputs: Any, reference: list[int] | None, declared: int | None, classes: set[int] | None
) -> None:
    table = ChecksTable(classes=declared)
    labels = None if reference is None else np.array(reference)
    wanted = restrict_classes(derive_expectation(table, INPUTS, labels), outputs, table)
    assert wanted.classes == classes


@pytest.mark.parametrize(
    "outputs", [np.array([0, 1, 1, 1, 0]), np.eye(2)[[0, 1, 1, 1, 0]]], ids=["class", "logits"]
)
def test_correct_predictions_are_counted_by_version(outputs: Any) -> None:
    labels: list[Any] = [0, 0, None, 1.0, 5]
    versions = np.array([3, 3, 3, 2, 2])
    assert measure_live_accuracy(outputs, labels, versions, frozenset({0, 1})) == (
        LiveAccuracy(version=2, labelled=2, right=1),
        LiveAccuracy(version=3, labelled=2, right=1),
    )
    assert measure_live_accuracy(outputs, labels, versions, None) == ()


def test_probabilities_of_one_class_have_a_live_accuracy() -> None:
    outputs, versions = np.array([0.9, 0.2, 0.7], np.float32), np.array([1, 1, 1])
    wanted = restrict_classes(derive_expectation(ChecksTable(), INPUTS, LABELS % 2), outputs, ChecksTable())
    assert wanted.classes == frozenset({0, 1})
    assert measure_live_accuracy(outputs, [1, 0, 0], versions, wanted.classes) == (
        LiveAccuracy(version=1, labelled=3, right=2),
    )


def test_a_logit_is_no_class() -> None:
    expectation = derive_expectation(ChecksTable(), INPUTS, LABELS % 2)
    assert restrict_classes(expectation, np.array([-4.0, 3.0]), ChecksTable()).classes is None
