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

from fedbus.agents.common.asyncio_tools import every
from fedbus.agents.inference.engine import Engine, Served
from fedbus.agents.inference.plain_json import one_line
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.message import Message
from fedbus.contracts.serving import DataChecked, DataCounted, DriftDetected, Sketch
from fedbus.contracts.task.serving import CaptureTable, ChecksTable
from fedbus.contracts.telemetry import (
    CLIENT,
    DATA_CHECK,
    DATA_CHECK_DURATION,
    DATA_PSI,
    DATA_ROWS,
    TASK,
    note,
    record,
)
from fedbus.domain import drift
from fedbus.domain.data_checks import Expected, answered_by, class_counts, expected, findings, live_accuracy
from fedbus.domain.prediction_comparison import one_number_each
from fedbus.learning.flower.task_code import BadTask
from fedbus.stores.captured.reader import Ever, Rows, Shares, ever, newest_rows, shares
from fedbus.stores.captured.store import CapturedData
from fedbus.stores.errors import StoreError

COUNT_S: Final = 5.0
NO_SCIPY: Final = "SciPy is not installed on the device: pip install 'fedbus[drift]'"
NO_REFERENCE: Final = (
    "there is nothing to compare with: name `samples`, or `reference` in [tool.fedbus.checks]"
)
UNREADABLE: Final = "the task's reference cannot be had: the device's log says why"
ASKED_OF_THE_MODEL: Final = 1000
"""Samples of the reference that the model answers, to see what its answers are to be compared with."""
_AT_ONCE: Final = 128

log = structlog.get_logger("fedbus.inference_watch")
Array: TypeAlias = np.ndarray[Any, Any]
Labelled: TypeAlias = tuple[Array, Array]


@dataclass(frozen=True)
class _Counted:
    """What there is, and what has ever come: a full store has others without having more."""

    there: Shares
    ever: Ever


@dataclass
class _Known:
    """What the rows are compared with."""

    expected: Expected
    inputs: drift.Reference | None = None
    samples: Array | None = None
    answers: drift.Numbers | drift.Classes | None = None
    answers_of: Served | None = None
    """The model that gave them."""
    drift_unknown: str = ""
    """Why nothing is compared, where nothing is."""


class DataWatch:
    """One client's data in one task. *reference* gives what the model was trained on; it blocks."""

    def __init__(
        self,
        captured: CapturedData,
        engine: Engine,
        checks: ChecksTable,
        capture: CaptureTable,
        say: Callable[[Message], None],
        *,
        task: str,
        client: ClientId,
        reference: Callable[[], Labelled | None] = lambda: None,
        count_s: float = COUNT_S,
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
        self._counted: _Counted | None = None
        self._checked: _Counted | None = None
        self._drifting: set[str] = set()
        self._limits = drift.Limits(checks.max_psi, checks.max_p)

    async def run(self) -> None:
        """Look, for ever."""
        known = await asyncio.to_thread(self._learn)
        async with asyncio.TaskGroup() as group:
            group.create_task(every(self._count_s, self.count), name="count data")
            group.create_task(every(self._table.every_s, lambda: self.check(known)), name="check data")

    async def count(self) -> None:
        """Say how many rows there are and have come, if that has changed."""
        counted = await self._count()
        if counted is None or counted == self._counted:
            return
        self._counted = counted
        for use, number in vars(counted.there).items():
            note(DATA_ROWS, number, self._about | {"fedbus.use": use})
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

    async def check(self, known: _Known) -> None:
        """Check the newest rows, if there are new ones."""
        counted = await self._count()
        if counted is None or counted == self._checked or not any(vars(counted.there).values()):
            return
        self._checked = counted
        try:
            await asyncio.to_thread(self._look, known)
        except (StoreError, ValueError) as error:  # whatever the data are, predictions go on
            log.warning("captured data are not checked", reason=one_line(error))

    async def _count(self) -> _Counted | None:
        """What there is now, with all that was added before; None where the store cannot say."""
        try:
            await self._captured.written()
            path = self._captured.path
            there = await asyncio.to_thread(shares, path, self._share)
            return _Counted(there, await asyncio.to_thread(ever, path))
        except StoreError as error:
            log.warning("captured data are not counted", reason=str(error))
            return None

    # --- in a thread ------------------------------------------------------------------------------

    def _learn(self) -> _Known:
        """What the model was trained on, as far as the task says."""
        try:
            reference = self._reference()
        except BadTask as error:
            log.warning("data are checked without a reference", reason=str(error))
            return _Known(expected(self._table), drift_unknown=UNREADABLE)
        if reference is None:
            return _Known(expected(self._table), drift_unknown=NO_REFERENCE)
        inputs, labels = reference
        known = _Known(expected(self._table, inputs, labels))
        if not drift.available():
            log.warning("drift is not looked for", reason=NO_SCIPY)
            known.drift_unknown = NO_SCIPY
            return known
        known.inputs = drift.reference(inputs)
        known.samples = inputs[:: max(1, len(inputs) // ASKED_OF_THE_MODEL)]
        return known

    def _look(self, known: _Known) -> None:
        began = time.monotonic()
        rows = newest_rows(self._captured.path, self._table.max_rows)
        shifts = self._shifts_of_inputs(rows, known)
        answers = self._shift_of_answers(rows, known)
        drifted = {
            of: found
            for of, found in (
                ("inputs", drift.worst(shifts, self._limits)),
                ("predictions", drift.worst([answers], self._limits) if answers else None),
            )
            if found is not None
        }
        wanted = answered_by(known.expected, rows.outputs, self._table)
        seconds = time.monotonic() - began
        checked = DataChecked(
            task=self._task,
            client=self._client,
            rows=len(rows),
            findings=findings(rows.inputs, rows.labels, wanted, self._table),
            classes=class_counts(rows.labels, wanted.classes),
            inputs=tuple(map(_sketch, shifts)),
            predictions=_sketch(answers) if answers else None,
            drifting=bool(drifted),
            drift_unknown=known.drift_unknown,
            serving=self._engine.current.version if self._engine.current else None,
            live=live_accuracy(rows.outputs, rows.labels, rows.versions, wanted.classes),
            seconds=seconds,
        )
        self._measure(checked)
        self._say(checked)
        for of, (worst, features) in drifted.items():
            if of not in self._drifting:
                self._say(self._drift(of, worst, features, len(rows)))
        self._drifting = set(drifted)

    def _shifts_of_inputs(self, rows: Rows, known: _Known) -> list[drift.Shift]:
        if known.inputs is None or len(rows) < self._table.min_rows:
            return []
        if known.samples is not None and rows.inputs.shape[1:] != known.samples.shape[1:]:
            return []  # against the schema, and told as such
        return known.inputs.shifts(rows.inputs)

    def _shift_of_answers(self, rows: Rows, known: _Known) -> drift.Shift | None:
        """The answers of the model that serves, against its own answers to the reference."""
        served = self._engine.serving
        if served is None or known.samples is None:
            return None
        own = rows.outputs[rows.versions == served.ref.version]
        if len(own) < self._table.min_rows:
            return None
        answers = self._answers_of(served, known, known.samples)
        return answers.shift(np.asarray(one_number_each(own))) if answers is not None else None

    def _answers_of(
        self, served: Served, known: _Known, samples: Array
    ) -> drift.Numbers | drift.Classes | None:
        """Ask the model about the reference, once, between the requests that it answers; None where it fails."""
        if known.answers_of is served:
            return known.answers
        try:
            answers = [
                self._engine.in_turn(lambda some=some: served.predictor.predict(some))  # type: ignore[misc]
                for some in np.array_split(samples, max(1, len(samples) // _AT_ONCE))
            ]
        except Exception as error:  # noqa: BLE001 - the task's own code; and on leaving, no more thread
            log.warning("the model does not answer the reference", reason=one_line(error))
            return None
        known.answers = drift.answers_reference(np.asarray(one_number_each(np.concatenate(answers))))
        known.answers_of = served
        return known.answers

    def _drift(self, of: str, worst: drift.Shift, features: int, rows: int) -> DriftDetected:
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
            note(DATA_CHECK, finding.value, self._about | {"fedbus.check": finding.check})
        for sketch in (*checked.inputs, *filter(None, [checked.predictions])):
            if sketch.psi is not None:
                note(DATA_PSI, sketch.psi, self._about | {"fedbus.feature": sketch.feature})


def _sketch(shift: drift.Shift) -> Sketch:
    return Sketch(feature=shift.feature, counts=shift.counts, psi=shift.psi, ks=shift.ks, p=shift.p)
