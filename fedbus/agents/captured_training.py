"""What a device has captured, as training data: the rows with a label, or what the task makes of all of them.

Rows that are held out stay out: new models are judged by them. Everything here blocks.
"""

from pathlib import Path

from fedbus.contracts.task import Task
from fedbus.learning.device_data import training_data
from fedbus.stores.captured_rows import rows_for_training, snapshot_labelled, write_training_data


def write_captured(task: Task, database: Path, path: Path) -> int:
    """Write *path*, an .npz with ``inputs`` and ``labels``; how many there are, and no file where there are none.

    Raises StoreError, and BadTask where the task's own function does not make training data of them.
    """
    share = task.table.capture.holdout_share
    if task.table.capture.training_data is None:
        return snapshot_labelled(database, path, holdout_share=share)
    rows = rows_for_training(database, holdout_share=share)
    if not len(rows):
        return snapshot_labelled(database, path, holdout_share=1.0)
    inputs, labels = training_data(task, rows.inputs, rows.outputs, rows.labels)
    return write_training_data(path, inputs, labels)
