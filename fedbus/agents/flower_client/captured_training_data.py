"""Writes captured data as training data: the rows with a label, or the result of the task's own function.

Held-out rows are excluded, since new models are evaluated on them. Rows that do not fit the task's tables are
excluded and counted. All functions block.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.contracts.task.task import Task
from fedbus.domain.row_validation import valid_rows
from fedbus.learning.device_data import build_training_data
from fedbus.stores.captured.reader import read_labelled_rows, read_training_rows, write_training_data


@dataclass(frozen=True)
class WrittenRows:
    """The number of rows for training, and of rows that are excluded because they do not validate."""

    rows: int = 0
    skipped_rows: int = 0


NO_ROWS: Final = WrittenRows()


def write_training_rows(task: Task, database: Path, path: Path) -> WrittenRows:
    """Write the rows of *database* to *path*, an .npz file with ``inputs`` and ``labels``. Without rows, remove it.

    Raises:
        StoreError: the database cannot be read, or the file cannot be written.
        BadTask: the task's own function fails, or returns invalid training data.

    """
    table = task.table
    share = table.capture.holdout_share
    if (reference := table.capture.training_data) is None:
        inputs, labels = read_labelled_rows(database, holdout_share=share)
        valid = valid_rows(inputs, labels, table.serving, table.checks)
        count = write_training_data(path, inputs[valid], labels[valid])
        return WrittenRows(count, len(labels) - count)
    rows = read_training_rows(database, holdout_share=share)
    valid = valid_rows(rows.inputs, rows.labels, table.serving, table.checks)
    left_out = len(rows) - int(valid.sum())
    if left_out == len(rows):
        return WrittenRows(write_training_data(path, rows.inputs[:0], rows.inputs[:0]), left_out)
    labels_of_valid = [label for label, is_valid in zip(rows.labels, valid, strict=True) if is_valid]
    inputs, labels = build_training_data(
        task, reference, rows.inputs[valid], rows.outputs[valid], labels_of_valid
    )
    return WrittenRows(write_training_data(path, inputs, labels), left_out)
