"""What is checked of the captured rows on a device: schema, range, class balance, missing labels.

Each check is one finding: what it came to, what it may come to, and whether that is well. What a
finding says in words holds no value of a sample, and no label but a class: findings leave the device.

A label is a class where the task says how many there are (`checks.classes`), or where it is a small whole number and
the model answers with classes: by whole numbers, or by one number for each of them. The labels of a regression are
values of the data as inputs are, and are neither named nor counted one by one.
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
"""Of the width of the reference, by how much inputs may be beyond it."""
MAX_CLASSES = 1000
"""Beyond so many, on either side of nought, whole numbers are values and no classes, unless the task says so."""
OTHER_CLASS = "other"
"""What all labels that are no known class are counted under."""


@dataclass(frozen=True)
class DataExpectation:
    """What inputs and labels should be; None: nothing is known of it."""

    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    classes: frozenset[int] | None = None


def derive_expectation(
    table: ChecksTable, inputs: Array | None = None, labels: Array | None = None
) -> DataExpectation:
    """What the *table* says, and else what the reference *inputs* and *labels* have."""
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
    """What is found in *inputs* (n, …) and their *labels*, of which None is unknown; nothing in no rows."""
    if not labels:
        return ()
    return (
        _check_schema(inputs, labels, wanted),
        _check_range(inputs, wanted),
        *_check_balance(labels, wanted, table),
        _check_missing_labels(labels, table),
    )


def restrict_classes(wanted: DataExpectation, outputs: Array, table: ChecksTable) -> DataExpectation:
    """*wanted*, with no classes where the model's *outputs* (n, …) are none and the task declares none."""
    if table.classes is not None or not len(outputs):
        return wanted
    return replace(wanted, classes=_output_classes(outputs, wanted.classes))


def count_classes(labels: list[Label | None], classes: frozenset[int] | None) -> dict[str, int]:
    """How many rows have each of the known *classes*, and how many labels are none; nothing without classes."""
    if classes is None:
        return {}
    known = _labels_in_classes(labels, classes)
    counts = Counter(known)
    others = sum(one is not None for one in labels) - len(known)
    return {str(one): counts[one] for one in sorted(counts)} | ({OTHER_CLASS: others} if others else {})


def measure_live_accuracy(
    outputs: Array, labels: list[Label | None], versions: Array, classes: frozenset[int] | None
) -> tuple[LiveAccuracy, ...]:
    """How often each of the *versions* was right where the truth is known, oldest first; nothing without *classes*."""
    known = [at for at, label in enumerate(labels) if label is not None]
    if classes is None or not known:
        return ()
    answers, of_version = to_scalars(outputs[known]), versions[known].tolist()
    right = Counter(
        version
        for version, answer, at in zip(of_version, answers, known, strict=True)
        if answer == labels[at]
    )
    counts = sorted(Counter(of_version).items())
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
    """Which of *classes* may be meant where the model answers so; a number that is no whole one may mean yes or no."""
    of_each = outputs[0].size
    if of_each > MAX_CLASSES:
        return None
    if of_each > 1:
        return classes or frozenset(range(of_each))
    yes_or_no = classes is not None and classes <= {0, 1}
    return classes if outputs.dtype.kind in "iub" or yes_or_no else None


def _check_schema(inputs: Array, labels: list[Label | None], wanted: DataExpectation) -> DataCheckResult:
    """Rows come alike from the store; a label that is no known class is against the schema too."""
    strange = 0
    if wanted.classes is not None:
        strange = sum(one is not None for one in labels) - len(_labels_in_classes(labels, wanted.classes))
    what = f"{strange} labels are none of the known classes" if strange else ""
    if wanted.shape is not None and inputs.shape[1:] != wanted.shape:
        strange, what = len(labels), f"inputs are {list(inputs.shape[1:])}, and were {list(wanted.shape)}"
    elif wanted.dtype is not None and str(inputs.dtype) != wanted.dtype:
        strange, what = len(labels), f"inputs are {inputs.dtype}, and were {wanted.dtype}"
    return DataCheckResult(check="schema", ok=not strange, value=strange / len(labels), limit=0.0, what=what)


def _check_range(inputs: Array, wanted: DataExpectation) -> DataCheckResult:
    count = int(out_of_range(inputs, wanted.minimum, wanted.maximum).sum())
    what = f"{count} of {len(inputs)} rows hold numbers beyond what is expected" if count else ""
    return DataCheckResult(check="range", ok=not count, value=count / len(inputs), limit=0.0, what=what)


def _check_balance(
    labels: list[Label | None], wanted: DataExpectation, table: ChecksTable
) -> Iterator[DataCheckResult]:
    """The share of the rarest class among the labelled rows; where there are no classes, nothing."""
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
