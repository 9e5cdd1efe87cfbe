"""What a device has captured, as training data: the rows with a label, or what the task makes of all of them.

Rows that are held out stay out: new models are judged by them. Rows that are not as the task's tables want them
stay out too, and are counted. Everything here blocks.
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
    """How many rows a training gets, and how many it does not get since they do not fit."""

    rows: int = 0
    left_out: int = 0


NO_ROWS: Final = WrittenRows()


def write_training_rows(task: Task, database: Path, path: Path) -> WrittenRows:
    """Write *path*, an .npz with ``inputs`` and ``labels``; where there are none, there is no file.

    Raises StoreError, and BadTask where the task's own function does not make training data of them.
    """
    table = task.table
    share = table.capture.holdout_share
    if table.capture.training_data is None:
        inputs, labels = read_labelled_rows(database, holdout_share=share)
        fits = valid_rows(inputs, labels, table.serving, table.checks)
        count = write_training_data(path, inputs[fits], labels[fits])
        return WrittenRows(count, len(labels) - count)
    rows = read_training_rows(database, holdout_share=share)
    fits = valid_rows(rows.inputs, rows.labels, table.serving, table.checks)
    left_out = len(rows) - int(fits.sum())
    if left_out == len(rows):
        return WrittenRows(write_training_data(path, rows.inputs[:0], rows.inputs[:0]), left_out)
    known = [label for label, one in zip(rows.labels, fits, strict=True) if one]
    made = build_training_data(task, rows.inputs[fits], rows.outputs[fits], known)
    return WrittenRows(write_training_data(path, *made), left_out)
