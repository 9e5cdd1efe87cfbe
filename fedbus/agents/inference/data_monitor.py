"""The data of a device, looked at now and then: counted, checked, compared with what the model was trained on.

    every few seconds, if there is something new    → data_counted
    every `checks.every-s`, if there are new rows   → data_checked
    when inputs or predictions begin to drift       → drift_detected, once until they are well again

All of it is done in a thread, on the newest rows, of which there are at most `checks.max-rows`. What is said is
counts: no value of a sample, and no label but a class, leaves the device.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import structlog

from fedbus.agents.common.asyncio_tools import repeat_every
from fedbus.agents.inference.engine import InferenceEngine, LoadedModel
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
from fedbus.learning.flower.task_code import BadTask
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
SCIPY_MISSING: Final = "SciPy is not installed on the device: pip install 'fedbus[drift]'"
NO_REFERENCE: Final = (
    "there is nothing to compare with: name `samples`, or `reference` in [tool.fedbus.checks]"
)
REFERENCE_UNREADABLE: Final = "the task's reference cannot be had: the device's log says why"
MAX_REFERENCE_ROWS: Final = 1000
"""Samples of the reference that the model answers, to see what its answers are to be compared with."""
_BATCH_ROWS: Final = 128

log = structlog.get_logger("fedbus.inference_watch")
Array: TypeAlias = np.ndarray[Any, Any]
Labelled: TypeAlias = tuple[Array, Array]


@dataclass(frozen=True)
class _DataCounts:
    """What there is, and what has ever come: a full store has others without having more."""

    there: RowCounts
    ever: TotalCounts


@dataclass
class _Reference:
    """What the rows are compared with."""

    expected: DataExpectation
    inputs: drift.ReferenceDistribution | None = None
    samples: Array | None = None
    answers: drift.NumericReference | drift.CategoricalReference | None = None
    answers_of: LoadedModel | None = None
    """The model that gave them."""
    drift_unknown: str = ""
    """Why nothing is compared, where nothing is."""


class DataMonitor:
    """One client's data in one task. *reference* gives what the model was trained on; it blocks."""

    def __init__(
        self,
        captured: CapturedData,
        engine: InferenceEngine,
        checks: ChecksTable,
        capture: CaptureTable,
        say: Callable[[Message], None],
        *,
        task: str,
        client: ClientId,
        reference: Callable[[], Labelled | None] = lambda: None,
        count_s: float = COUNT_INTERVAL_S,
    ) -> None:
        self._captured = captured
        self._engine = engine
        self._table = checks
        self._share = capture.holdout_share
        self._say = say
        self._task = task
        self._client = client
        self._reference = reference
        self._count_s = count_s
        self._about = {TASK: task, CLIENT: client}
        self._counted: _DataCounts | None = None
        self._checked: _DataCounts | None = None
        self._drifting: set[str] = set()
        self._limits = drift.DriftLimits(checks.max_psi, checks.max_p)

    async def run(self) -> None:
        """Look, for ever."""
        known = await asyncio.to_thread(self._learn)
        async with asyncio.TaskGroup() as group:
            group.create_task(repeat_every(self._count_s, self.count), name="count data")
            group.create_task(repeat_every(self._table.every_s, lambda: self.check(known)), name="check data")

    async def count(self) -> None:
        """Say how many rows there are and have come, if that has changed."""
        counted = await self._count()
        if counted is None or counted == self._counted:
            return
        self._counted = counted
        for use, number in vars(counted.there).items():
            set_gauge(DATA_ROWS, number, self._about | {"fedbus.use": use})
        self._say(
            DataCounted(
                task=self._task,
                client=self._client,
                **vars(counted.there),
                labelled_ever=counted.ever.labelled,
                unlabelled_ever=counted.ever.unlabelled,
                database=counted.ever.database,
            )
        )

    async def check(self, known: _Reference) -> None:
        """Check the newest rows, if there are new ones."""
        counted = await self._count()
        if counted is None or counted == self._checked or not any(vars(counted.there).values()):
            return
        self._checked = counted
        try:
            await asyncio.to_thread(self._look, known)
        except (StoreError, ValueError) as error:  # whatever the data are, predictions go on
            log.warning("captured data are not checked", reason=to_one_line(error))

    async def _count(self) -> _DataCounts | None:
        """What there is now, with all that was added before; None where the store cannot say."""
        try:
            await self._captured.written()
            path = self._captured.path
            there = await asyncio.to_thread(read_row_counts, path, self._share)
            return _DataCounts(there, await asyncio.to_thread(read_total_counts, path))
        except StoreError as error:
            log.warning("captured data are not counted", reason=str(error))
            return None

    # --- in a thread ------------------------------------------------------------------------------

    def _learn(self) -> _Reference:
        """What the model was trained on, as far as the task says."""
        try:
            reference = self._reference()
        except BadTask as error:
            log.warning("data are checked without a reference", reason=str(error))
            return _Reference(derive_expectation(self._table), drift_unknown=REFERENCE_UNREADABLE)
        if reference is None:
            return _Reference(derive_expectation(self._table), drift_unknown=NO_REFERENCE)
        inputs, labels = reference
        known = _Reference(derive_expectation(self._table, inputs, labels))
        if not drift.is_scipy_available():
            log.warning("drift is not looked for", reason=SCIPY_MISSING)
            known.drift_unknown = SCIPY_MISSING
            return known
        known.inputs = drift.build_reference(inputs)
        known.samples = inputs[:: max(1, len(inputs) // MAX_REFERENCE_ROWS)]
        return known

    def _look(self, known: _Reference) -> None:
        began = time.monotonic()
        rows = read_newest_rows(self._captured.path, self._table.max_rows)
        shifts = self._shifts_of_inputs(rows, known)
        answers = self._shift_of_answers(rows, known)
        drifted = {
            of: found
            for of, found in (
                ("inputs", drift.most_drifted(shifts, self._limits)),
                ("predictions", drift.most_drifted([answers], self._limits) if answers else None),
            )
            if found is not None
        }
        wanted = restrict_classes(known.expected, rows.outputs, self._table)
        seconds = time.monotonic() - began
        checked = DataChecked(
            task=self._task,
            client=self._client,
            rows=len(rows),
            findings=check_data(rows.inputs, rows.labels, wanted, self._table),
            classes=count_classes(rows.labels, wanted.classes),
            inputs=tuple(map(_to_distribution, shifts)),
            predictions=_to_distribution(answers) if answers else None,
            drifting=bool(drifted),
            drift_unknown=known.drift_unknown,
            serving=self._engine.current.version if self._engine.current else None,
            live=measure_live_accuracy(rows.outputs, rows.labels, rows.versions, wanted.classes),
            seconds=seconds,
        )
        self._measure(checked)
        self._say(checked)
        for of, (worst, features) in drifted.items():
            if of not in self._drifting:
                self._say(self._drift(of, worst, features, len(rows)))
        self._drifting = set(drifted)

    def _shifts_of_inputs(self, rows: CapturedRows, known: _Reference) -> list[drift.FeatureShift]:
        if known.inputs is None or len(rows) < self._table.min_rows:
            return []
        if known.samples is not None and rows.inputs.shape[1:] != known.samples.shape[1:]:
            return []  # against the schema, and told as such
        return known.inputs.shifts(rows.inputs)

    def _shift_of_answers(self, rows: CapturedRows, known: _Reference) -> drift.FeatureShift | None:
        """The answers of the model that serves, against its own answers to the reference."""
        served = self._engine.serving
        if served is None or known.samples is None:
            return None
        own = rows.outputs[rows.versions == served.ref.version]
        if len(own) < self._table.min_rows:
            return None
        answers = self._answers_of(served, known, known.samples)
        return answers.shift(np.asarray(to_scalars(own))) if answers is not None else None

    def _answers_of(
        self, served: LoadedModel, known: _Reference, samples: Array
    ) -> drift.NumericReference | drift.CategoricalReference | None:
        """Ask the model about the reference, once, between the requests that it answers; None where it fails."""
        if known.answers_of is served:
            return known.answers
        try:
            answers = [
                self._engine.in_turn(lambda some=some: served.predictor.predict(some))  # type: ignore[misc]
                for some in np.array_split(samples, max(1, len(samples) // _BATCH_ROWS))
            ]
        except Exception as error:  # noqa: BLE001 - the task's own code; and on leaving, no more thread
            log.warning("the model does not answer the reference", reason=to_one_line(error))
            return None
        known.answers = drift.build_prediction_reference(np.asarray(to_scalars(np.concatenate(answers))))
        known.answers_of = served
        return known.answers

    def _drift(self, of: str, worst: drift.FeatureShift, features: int, rows: int) -> DriftDetected:
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

    def _measure(self, checked: DataChecked) -> None:
        record(DATA_CHECK_DURATION, checked.seconds, self._about)
        for finding in checked.findings:
            set_gauge(DATA_CHECK, finding.value, self._about | {"fedbus.check": finding.check})
        for sketch in (*checked.inputs, *filter(None, [checked.predictions])):
            if sketch.psi is not None:
                set_gauge(DATA_PSI, sketch.psi, self._about | {"fedbus.feature": sketch.feature})


def _to_distribution(shift: drift.FeatureShift) -> FeatureDistribution:
    return FeatureDistribution(
        feature=shift.feature, counts=shift.counts, psi=shift.psi, ks=shift.ks, p=shift.p
    )
