"""Checks of the captured rows on a device: schema, range, class balance, missing labels.

Each check returns a value, its limit, and whether the check passed. Results leave the device, so their texts
contain no value of a sample, and no label except a class.

A label is a class if the task declares the number of classes (`checks.classes`), or if it is a small integer and
the model predicts classes: as integers, or as one number for each class. The labels of a regression are private
like the inputs: they are neither named nor counted one by one.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from fedbus.contracts.serving import DataCheckResult, LiveAccuracy
from fedbus.contracts.task.serving import ChecksTable
from fedbus.domain.prediction_comparison import to_scalars
from fedbus.domain.row_validation import out_of_range

Array: TypeAlias = np.ndarray[Any, Any]
Label: TypeAlias = int | float | list[float]
RANGE_MARGIN = 0.1
"""How far inputs may exceed the range of the reference, as a share of its width."""
MAX_CLASSES = 1000
"""Integers with a larger absolute value are numbers and not classes, unless the task declares classes."""
OTHER_CLASS = "other"
"""The key under which all labels outside the known classes are counted."""


@dataclass(frozen=True)
class DataExpectation:
    """The expected inputs and labels; None: not known, so not checked."""

    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    classes: frozenset[int] | None = None


def derive_expectation(
    table: ChecksTable, inputs: Array | None = None, labels: Array | None = None
) -> DataExpectation:
    """Derive the expectation from the task's *table*, and from the reference data where the table is silent."""
    known = DataExpectation() if inputs is None else _expectation_from_reference(inputs)
    classes = _label_classes(labels)
    return DataExpectation(
        shape=known.shape,
        dtype=known.dtype,
        minimum=table.minimum if table.minimum is not None else known.minimum,
        maximum=table.maximum if table.maximum is not None else known.maximum,
        classes=frozenset(range(table.classes)) if table.classes is not None else classes,
    )


def check_data(
    inputs: Array, labels: list[Label | None], wanted: DataExpectation, table: ChecksTable
) -> tuple[DataCheckResult, ...]:
    """Check *inputs* (n, …) and their *labels* (None: unknown). Without rows there are no results."""
    if not labels:
        return ()
    return (
        _check_schema(inputs, labels, wanted),
        _check_range(inputs, wanted),
        *_check_balance(labels, wanted, table),
        _check_missing_labels(labels, table),
    )


def restrict_classes(wanted: DataExpectation, outputs: Array, table: ChecksTable) -> DataExpectation:
    """Remove the classes from *wanted* if the model's *outputs* (n, …) are not classes and the task declares none."""
    if table.classes is not None or not len(outputs):
        return wanted
    return replace(wanted, classes=_output_classes(outputs, wanted.classes))


def count_classes(labels: list[Label | None], classes: frozenset[int] | None) -> dict[str, int]:
    """Count the rows of each known class, and the labels that are no class; empty without *classes*."""
    if classes is None:
        return {}
    known = _labels_in_classes(labels, classes)
    counts = Counter(known)
    others = sum(one is not None for one in labels) - len(known)
    return {str(one): counts[one] for one in sorted(counts)} | ({OTHER_CLASS: others} if others else {})


def measure_live_accuracy(
    outputs: Array, labels: list[Label | None], versions: Array, classes: frozenset[int] | None
) -> tuple[LiveAccuracy, ...]:
    """Count the correct predictions of each model version on labelled rows, oldest version first.

    *versions* (n,) has the model version that made each prediction. The result is empty without *classes*. A
    probability of class 1 of at least 0.5 is a prediction of class 1.
    """
    known = [at for at, label in enumerate(labels) if label is not None]
    if classes is None or not known:
        return ()
    predictions, row_versions = to_scalars(outputs[known]), versions[known].tolist()
    if outputs.dtype.kind == "f" and outputs[0].size == 1 and classes <= {0, 1}:
        predictions = [
            float(one >= 0.5) for one in predictions
        ]  # probabilities of class 1, see `restrict_classes`
    right = Counter(
        version
        for version, prediction, at in zip(row_versions, predictions, known, strict=True)
        if prediction == labels[at]
    )
    counts = sorted(Counter(row_versions).items())
    return tuple(LiveAccuracy(version=one, labelled=count, right=right[one]) for one, count in counts)


def _expectation_from_reference(inputs: Array) -> DataExpectation:
    least, most = float(inputs.min()), float(inputs.max())
    margin = RANGE_MARGIN * (most - least)
    return DataExpectation(inputs.shape[1:], str(inputs.dtype), least - margin, most + margin)


def _label_classes(labels: Array | None) -> frozenset[int] | None:
    if labels is None or labels.dtype.kind not in "iu" or labels.ndim != 1:
        return None
    found = frozenset(int(one) for one in np.unique(labels))
    return found if all(abs(one) <= MAX_CLASSES for one in found) else None


def _output_classes(outputs: Array, classes: frozenset[int] | None) -> frozenset[int] | None:
    """Return the classes that the model's *outputs* can mean; None if they are no classes.

    One fractional output a sample, 0 to 1, is taken as the probability of class 1 if the classes are 0 and 1.
    """
    output_size = outputs[0].size
    if output_size > MAX_CLASSES:
        return None
    if output_size > 1:
        return classes or frozenset(range(output_size))
    is_binary = classes is not None and classes <= {0, 1}
    is_probability = is_binary and bool(np.all((outputs >= 0) & (outputs <= 1)))
    return classes if outputs.dtype.kind in "iub" or is_probability else None


def _check_schema(inputs: Array, labels: list[Label | None], wanted: DataExpectation) -> DataCheckResult:
    """Check shape, dtype and classes. All stored rows have one shape and dtype, so these fail for all or none."""
    violations = 0
    if wanted.classes is not None:
        violations = sum(one is not None for one in labels) - len(_labels_in_classes(labels, wanted.classes))
    what = f"{violations} labels are not one of the known classes" if violations else ""
    if wanted.shape is not None and inputs.shape[1:] != wanted.shape:
        violations = len(labels)
        what = f"inputs have shape {list(inputs.shape[1:])}, expected {list(wanted.shape)}"
    elif wanted.dtype is not None and str(inputs.dtype) != wanted.dtype:
        violations, what = len(labels), f"inputs have dtype {inputs.dtype}, expected {wanted.dtype}"
    return DataCheckResult(
        check="schema", ok=not violations, value=violations / len(labels), limit=0.0, what=what
    )


def _check_range(inputs: Array, wanted: DataExpectation) -> DataCheckResult:
    count = int(out_of_range(inputs, wanted.minimum, wanted.maximum).sum())
    what = f"{count} of {len(inputs)} rows have values outside the expected range" if count else ""
    return DataCheckResult(check="range", ok=not count, value=count / len(inputs), limit=0.0, what=what)


def _check_balance(
    labels: list[Label | None], wanted: DataExpectation, table: ChecksTable
) -> Iterator[DataCheckResult]:
    """Check the share of the rarest class among the labelled rows; no result without classes."""
    if wanted.classes is None or not (known := _labels_in_classes(labels, wanted.classes)):
        return
    counts = Counter(known)
    rarest = min(wanted.classes, key=lambda one: counts[one])
    share = counts[rarest] / len(known)
    ok = share >= table.min_class_share
    what = "" if ok else f"class {rarest} is {share:.1%} of {len(known)} labelled rows"
    yield DataCheckResult(check="balance", ok=ok, value=share, limit=table.min_class_share, what=what)


def _check_missing_labels(labels: list[Label | None], table: ChecksTable) -> DataCheckResult:
    missing = sum(one is None for one in labels)
    share = missing / len(labels)
    ok = share <= table.max_unlabelled_share
    what = "" if ok else f"{missing} of {len(labels)} rows have no label"
    return DataCheckResult(check="labels", ok=ok, value=share, limit=table.max_unlabelled_share, what=what)


def _labels_in_classes(labels: list[Label | None], classes: frozenset[int]) -> list[int]:
    return [int(one) for one in labels if isinstance(one, int | float) and one in classes]
