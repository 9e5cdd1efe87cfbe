"""The data monitor: counts the captured rows of a device, checks them, and compares them with the reference.

    every COUNT_INTERVAL_S, if the counts changed   → data_counted
    every `checks.every-s`, if there are new rows   → data_checked
    when inputs or predictions start to drift       → drift_detected, once until the drift ends

The checks run in a thread, on the newest rows, at most `checks.max-rows`. The published messages contain counts and
statistics only: no value of a sample and no label except a class leaves the device.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import structlog

from fedbus.agents.common.asyncio_tools import repeat_every
from fedbus.agents.inference.engine import InferenceEngine
from fedbus.agents.inference.loaded_model import LoadedModel
from fedbus.agents.inference.plain_json import to_one_line
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.message import Message
from fedbus.contracts.serving import DataChecked, DataCounted, DriftDetected, FeatureDistribution
from fedbus.contracts.task.serving import CaptureTable, ChecksTable
from fedbus.contracts.telemetry import (
    CLIENT,
    DATA_CHECK,
    DATA_CHECK_DURATION,
    DATA_PSI,
    DATA_ROWS,
    TASK,
    record,
    set_gauge,
)
from fedbus.domain import drift
from fedbus.domain.data_checks import (
    DataExpectation,
    check_data,
    count_classes,
    derive_expectation,
    measure_live_accuracy,
    restrict_classes,
)
from fedbus.domain.prediction_comparison import to_scalars
from fedbus.learning.task_code import BadTask
from fedbus.stores.captured.reader import (
    CapturedRows,
    RowCounts,
    TotalCounts,
    read_newest_rows,
    read_row_counts,
    read_total_counts,
)
from fedbus.stores.captured.store import CapturedData
from fedbus.stores.errors import StoreError

COUNT_INTERVAL_S: Final = 5.0
SCIPY_MISSING: Final = "SciPy is not installed on the device. Run pip install 'fedbus[drift]'"
NO_REFERENCE: Final = "the task has no reference data. Set `samples`, or `reference` in [tool.fedbus.checks]"
REFERENCE_UNREADABLE: Final = "cannot load the reference data of the task. See the log of the device"
MAX_REFERENCE_ROWS: Final = 1000
"""Number of reference samples that the model predicts, for the reference distribution of its predictions."""
_BATCH_ROWS: Final = 128

log = structlog.get_logger("fedbus.inference")
Array: TypeAlias = np.ndarray[Any, Any]
Labelled: TypeAlias = tuple[Array, Array]


@dataclass(frozen=True)
class _DataCounts:
    """The stored rows, and the total ever captured; in a full store only the total changes."""

    stored: RowCounts
    total: TotalCounts


@dataclass
class _Reference:
    """The reference that captured rows are compared with."""

    expectation: DataExpectation
    inputs: drift.ReferenceDistribution | None = None
    samples: Array | None = None
    predictions: drift.NumericReference | drift.CategoricalReference | None = None
    predicted_by: LoadedModel | None = None
    no_drift_reason: str = ""
    """Why drift cannot be measured; empty if it can."""


class DataMonitor:
    """The monitor of one client's captured data in one task.

    *reference* loads samples and labels of the training data; it blocks.
    """

    def __init__(
        self,
        captured: CapturedData,
        engine: InferenceEngine,
        checks: ChecksTable,
        capture: CaptureTable,
        publish: Callable[[Message], None],
        *,
        task: str,
        client: ClientId,
        reference: Callable[[], Labelled | None] = lambda: None,
        count_s: float = COUNT_INTERVAL_S,
    ) -> None:
        self._captured = captured
        self._engine = engine
        self._table = checks
        self._holdout_share = capture.holdout_share
        self._publish = publish
        self._task = task
        self._client = client
        self._reference = reference
        self._count_s = count_s
        self._attributes = {TASK: task, CLIENT: client}
        self._published_counts: _DataCounts | None = None
        self._checked_counts: _DataCounts | None = None
        self._drifting: set[str] = set()
        self._limits = drift.DriftLimits(checks.max_psi, checks.max_p)

    async def run(self) -> None:
        """Count and check the data, forever."""
        reference = await asyncio.to_thread(self._load_reference)
        async with asyncio.TaskGroup() as group:
            group.create_task(repeat_every(self._count_s, self.publish_counts), name="count data")
            group.create_task(
                repeat_every(self._table.every_s, lambda: self.check_new_rows(reference)), name="check data"
            )

    async def publish_counts(self) -> None:
        """Publish the counts of rows if they changed."""
        counts = await self._read_counts()
        if counts is None or counts == self._published_counts:
            return
        self._published_counts = counts
        for use, number in vars(counts.stored).items():
            set_gauge(DATA_ROWS, number, self._attributes | {"fedbus.use": use})
        self._publish(
            DataCounted(
                task=self._task,
                client=self._client,
                **vars(counts.stored),
                labelled_ever=counts.total.labelled,
                unlabelled_ever=counts.total.unlabelled,
                database=counts.total.database,
            )
        )

    async def check_new_rows(self, reference: _Reference) -> None:
        """Check the newest rows, if there are new ones."""
        counts = await self._read_counts()
        if counts is None or counts == self._checked_counts or not any(vars(counts.stored).values()):
            return
        self._checked_counts = counts
        try:
            await asyncio.to_thread(self._check_rows, reference)
        except (StoreError, ValueError) as error:  # invalid data must not stop the predictions
            log.warning("Check of captured data failed", reason=to_one_line(error))

    async def _read_counts(self) -> _DataCounts | None:
        """Read the counts after all pending writes; None if the store is unavailable."""
        try:
            await self._captured.flush()
            path = self._captured.path
            stored = await asyncio.to_thread(read_row_counts, path, self._holdout_share)
            return _DataCounts(stored, await asyncio.to_thread(read_total_counts, path))
        except StoreError as error:
            log.warning("Count of captured data failed", reason=str(error))
            return None

    # --- in a thread ------------------------------------------------------------------------------

    def _load_reference(self) -> _Reference:
        """Load the reference data of the task and compute their distributions."""
        try:
            data = self._reference()
        except BadTask as error:
            log.warning("Cannot load the reference data; checking without them", reason=str(error))
            return _Reference(derive_expectation(self._table), no_drift_reason=REFERENCE_UNREADABLE)
        if data is None:
            return _Reference(derive_expectation(self._table), no_drift_reason=NO_REFERENCE)
        inputs, labels = data
        reference = _Reference(derive_expectation(self._table, inputs, labels))
        if not drift.is_scipy_available():
            log.warning("Drift detection disabled", reason=SCIPY_MISSING)
            reference.no_drift_reason = SCIPY_MISSING
            return reference
        reference.inputs = drift.build_reference(inputs)
        reference.samples = inputs[:: max(1, len(inputs) // MAX_REFERENCE_ROWS)]
        return reference

    def _check_rows(self, reference: _Reference) -> None:
        start = time.monotonic()
        rows = read_newest_rows(self._captured.path, self._table.max_rows)
        input_shifts = self._input_shifts(rows, reference)
        prediction_shift = self._prediction_shift(rows, reference)
        prediction_shifts = [prediction_shift] if prediction_shift else []
        drifted = {
            of: result
            for of, result in (
                ("inputs", drift.most_drifted(input_shifts, self._limits)),
                ("predictions", drift.most_drifted(prediction_shifts, self._limits)),
            )
            if result is not None
        }
        expectation = restrict_classes(reference.expectation, rows.outputs, self._table)
        seconds = time.monotonic() - start
        checked = DataChecked(
            task=self._task,
            client=self._client,
            rows=len(rows),
            findings=check_data(rows.inputs, rows.labels, expectation, self._table),
            classes=count_classes(rows.labels, expectation.classes),
            inputs=tuple(map(_to_distribution, input_shifts)),
            predictions=_to_distribution(prediction_shift) if prediction_shift else None,
            drifting=bool(drifted),
            drift_unknown=reference.no_drift_reason,
            serving=self._engine.current.version if self._engine.current else None,
            live=measure_live_accuracy(rows.outputs, rows.labels, rows.versions, expectation.classes),
            seconds=seconds,
        )
        self._record_metrics(checked)
        self._publish(checked)
        for of, (worst, features) in drifted.items():
            if of not in self._drifting:
                self._publish(self._drift_detected(of, worst, features, len(rows)))
        self._drifting = set(drifted)

    def _input_shifts(self, rows: CapturedRows, reference: _Reference) -> list[drift.FeatureShift]:
        if reference.inputs is None or len(rows) < self._table.min_rows:
            return []
        if reference.samples is not None and rows.inputs.shape[1:] != reference.samples.shape[1:]:
            return []  # a finding of the schema check
        return reference.inputs.compare(rows.inputs)

    def _prediction_shift(self, rows: CapturedRows, reference: _Reference) -> drift.FeatureShift | None:
        """Compare the captured predictions of the served model with its predictions on the reference."""
        model = self._engine.serving
        if model is None or reference.samples is None:
            return None
        outputs = rows.outputs[rows.versions == model.ref.version]
        if len(outputs) < self._table.min_rows:
            return None
        predictions = self._predict_reference(model, reference, reference.samples)
        return predictions.compare(np.asarray(to_scalars(outputs))) if predictions is not None else None

    def _predict_reference(
        self, model: LoadedModel, reference: _Reference, samples: Array
    ) -> drift.NumericReference | drift.CategoricalReference | None:
        """Predict the reference once for each model, in the model thread; None if the model fails."""
        if reference.predicted_by is model:
            return reference.predictions
        try:
            outputs = [
                self._engine.run_in_model_thread(lambda batch=batch: model.predictor.predict(batch))  # type: ignore[misc]
                for batch in np.array_split(samples, max(1, len(samples) // _BATCH_ROWS))
            ]
        except Exception as error:  # noqa: BLE001 - code of the task, or the thread has stopped
            log.warning("Prediction of the reference data failed", reason=to_one_line(error))
            return None
        reference.predictions = drift.build_prediction_reference(
            np.asarray(to_scalars(np.concatenate(outputs)))
        )
        reference.predicted_by = model
        return reference.predictions

    def _drift_detected(self, of: str, worst: drift.FeatureShift, features: int, rows: int) -> DriftDetected:
        return DriftDetected(
            task=self._task,
            client=self._client,
            of=of,
            feature=worst.feature,
            score=worst.psi,
            ks=worst.ks,
            p=worst.p,
            features=features,
            rows=rows,
        )

    def _record_metrics(self, checked: DataChecked) -> None:
        record(DATA_CHECK_DURATION, checked.seconds, self._attributes)
        for finding in checked.findings:
            set_gauge(DATA_CHECK, finding.value, self._attributes | {"fedbus.check": finding.check})
        for distribution in (*checked.inputs, *filter(None, [checked.predictions])):
            if distribution.psi is not None:
                attributes = self._attributes | {"fedbus.feature": distribution.feature}
                set_gauge(DATA_PSI, distribution.psi, attributes)


def _to_distribution(shift: drift.FeatureShift) -> FeatureDistribution:
    return FeatureDistribution(
        feature=shift.feature, counts=shift.counts, psi=shift.psi, ks=shift.ks, p=shift.p
    )
