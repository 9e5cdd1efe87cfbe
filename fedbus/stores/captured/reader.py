"""Read captured rows while another process captures: for training, for the evaluation of models, for checks.

A share of the rows is *held out* for evaluation: the id of a row decides, so that the choice never changes. No
training gets these rows. All functions block; each reads in one transaction and does not block the writer.
"""

import io
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from fedbus.common.filesystem import atomic_open
from fedbus.stores.errors import REMEDY_RESTORE_OR_MOVE, StoreCorrupt, StoreUnavailable

_KNUTH_MULTIPLIER: Final = 2_654_435_761
"""Knuth's multiplicative hash: spreads consecutive ids."""
_LABELLED = (
    "SELECT input, label FROM captured WHERE label IS NOT NULL AND NOT held_out(id, :share) ORDER BY id"
)
_NEWEST = "SELECT input, output, label, model_version FROM captured ORDER BY id DESC LIMIT ?"
_FOR_TRAINING = (
    "SELECT input, output, label, model_version FROM captured WHERE NOT held_out(id, ?) ORDER BY id DESC"
)
_HELD_OUT = """
SELECT input, output, label, model_version FROM captured
WHERE label IS NOT NULL AND held_out(id, ?) ORDER BY id DESC LIMIT ?
"""
_ROW_COUNTS = """
SELECT label IS NOT NULL, held_out(id, ?), count(*) FROM captured GROUP BY 1, 2
"""

Array: TypeAlias = np.ndarray[Any, Any]
Label: TypeAlias = int | float | list[float]


@dataclass(frozen=True)
class RowCounts:
    """The numbers of rows for training, and of labelled rows that are held out."""

    labelled: int
    unlabelled: int
    holdout: int


@dataclass(frozen=True)
class TotalCounts:
    """The numbers of rows inserted since the database was created, with and without a label; they only grow.

    Held-out rows are not counted. A row that got its label later is counted in both.
    """

    database: str
    """Id of the database file: a new file starts at 0."""
    labelled: int
    unlabelled: int


@dataclass(frozen=True)
class CapturedRows:
    """Captured rows of one shape: *inputs* (n, …), *outputs* (n, …), and a label or None for each."""

    inputs: Array
    outputs: Array
    labels: list[Label | None]
    versions: Array
    """The model version of each output, shape (n,)."""

    def __len__(self) -> int:
        return len(self.labels)


def is_held_out(row: int, share: float) -> bool:
    """Return whether the row with this id belongs to the held-out *share*."""
    return row * _KNUTH_MULTIPLIER % 2**32 < share * 2**32


def read_labelled_rows(database: Path, *, holdout_share: float = 0.0) -> tuple[Array, Array]:
    """Return inputs (n, …) and labels (n,) of all labelled rows with the shape of the newest, without held-out rows."""
    if not database.exists():
        return np.empty(0), np.empty(0)
    with read_transaction(database) as connection:
        return _select_labelled(connection, holdout_share)


def write_training_data(path: Path, inputs: Array, labels: Array) -> int:
    """Write *inputs* (n, …) and *labels* (n,) to *path* as .npz; without rows, remove *path*. Returns n."""
    if len(labels):
        _write_npz(path, inputs=inputs, labels=labels)
    else:
        path.unlink(missing_ok=True)
    return len(labels)


def read_row_counts(database: Path, holdout_share: float) -> RowCounts:
    """Return the numbers of rows for training and held out."""
    with read_transaction(database) as connection:
        groups = connection.execute(_ROW_COUNTS, (holdout_share,)).fetchall()
    counts = {(bool(labelled), bool(held_out)): count for labelled, held_out, count in groups}
    return RowCounts(counts.get((True, False), 0), counts.get((False, False), 0), counts.get((True, True), 0))


def read_total_counts(database: Path) -> TotalCounts:
    """Return the numbers of rows inserted so far. The writer of the database must be this version of fedbus."""
    with read_transaction(database) as connection:
        return TotalCounts(*connection.execute("SELECT database, labelled, unlabelled FROM ever").fetchone())


def read_holdout_share(database: Path) -> float | None:
    """Return the held-out share of the last writer; None for a database of an older version."""
    with read_transaction(database) as connection:
        if not connection.execute("SELECT * FROM sqlite_master WHERE name = 'ever'").fetchone():
            return None
        share: float = connection.execute("SELECT holdout_share FROM ever").fetchone()[0]
        return share


def size_on_disk_bytes(database: Path) -> int:
    """Return the size on disk, with the WAL and shared-memory files of SQLite."""
    files = (database, *(database.with_name(database.name + suffix) for suffix in ("-wal", "-shm")))
    return sum(file.stat().st_size for file in files if file.exists())


def read_newest_rows(database: Path, limit: int) -> CapturedRows:
    """Return the newest *limit* rows with the shape of the newest."""
    with read_transaction(database) as connection:
        rows = connection.execute(_NEWEST, (limit,)).fetchall()
    return _select_same_shape(rows)


def read_training_rows(database: Path, *, holdout_share: float = 0.0) -> CapturedRows:
    """Return all rows that are not held out, labelled or not, with the shape of the newest; oldest first."""
    with read_transaction(database) as connection:
        rows = connection.execute(_FOR_TRAINING, (holdout_share,)).fetchall()
    newest_first = _select_same_shape(rows)
    return CapturedRows(
        newest_first.inputs[::-1],
        newest_first.outputs[::-1],
        newest_first.labels[::-1],
        newest_first.versions[::-1],
    )


def read_holdout_rows(database: Path, share: float, limit: int) -> CapturedRows:
    """Return the newest *limit* labelled rows that are held out."""
    with read_transaction(database) as connection:
        rows = connection.execute(_HELD_OUT, (share, limit)).fetchall()
    return _select_same_shape(rows)


def count_rows(database: Path) -> int:
    """Return the number of rows, in a process that has not opened the store."""
    with read_transaction(database) as connection:
        count: int = connection.execute("SELECT count(*) FROM captured").fetchone()[0]
        return count


def encode_array(array: Array | np.generic) -> bytes:
    """Encode *array* in the .npy format, never as a pickle."""
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise ValueError("an array of Python objects cannot be captured; it would need pickle")
    return _npy_header(array.dtype, array.shape) + array.tobytes()


@lru_cache(maxsize=64)
def _npy_header(dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> bytes:
    """Return the header of an .npy file, cached because it takes longer than the data."""
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def decode_array(content: bytes) -> Array:
    array: Array = np.load(io.BytesIO(content), allow_pickle=False)
    return array


@contextmanager
def read_transaction(database: Path) -> Iterator[sqlite3.Connection]:
    """Open a read-only transaction on *database* that does not block the writer."""
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.create_function("held_out", 2, is_held_out, deterministic=True)
            connection.execute("BEGIN")
            yield connection
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(database, error) from error
    except sqlite3.DatabaseError as error:
        raise StoreCorrupt(database, error, remedy=REMEDY_RESTORE_OR_MOVE) from error


def _select_same_shape(rows: list[tuple[bytes, bytes, str | None, int]]) -> CapturedRows:
    """Decode *rows*, newest first, and return those with the shape of the newest."""
    decoded = [
        (decode_array(sample), decode_array(output), label, version)
        for sample, output, label, version in rows
    ]
    if not decoded:
        return CapturedRows(np.empty(0), np.empty(0), [], np.empty(0))
    shapes = decoded[0][0].shape, decoded[0][1].shape
    inputs, outputs, label_texts, versions = zip(
        *(row for row in decoded if (row[0].shape, row[1].shape) == shapes), strict=True
    )
    labels = [None if text is None else json.loads(text) for text in label_texts]
    return CapturedRows(np.stack(inputs), np.stack(outputs), labels, np.asarray(versions))


def _select_labelled(connection: sqlite3.Connection, holdout_share: float) -> tuple[Array, Array]:
    """Return inputs and labels of the rows with the shape of the newest."""
    rows = connection.execute(_LABELLED, (holdout_share,)).fetchall()
    if not rows:
        return np.empty(0), np.empty(0)
    newest, label_shape = decode_array(rows[-1][0]), np.shape(json.loads(rows[-1][1]))
    inputs = np.empty((len(rows), *newest.shape), newest.dtype)
    labels: list[Label] = []
    for content, label_text in rows:
        sample, label = decode_array(content), json.loads(label_text)
        if sample.shape == newest.shape and np.shape(label) == label_shape:
            inputs[len(labels)] = sample
            labels.append(label)
    return inputs[: len(labels)], np.asarray(labels)


def _write_npz(path: Path, *, inputs: Array, labels: Array) -> None:
    assert not labels.dtype.hasobject, "a label is a number, or a list of numbers"
    try:
        with atomic_open(path) as file:
            np.savez(file, inputs=inputs, labels=labels)
    except OSError as error:
        raise StoreUnavailable(path, error) from error
