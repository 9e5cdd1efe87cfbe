"""Export captured rows as a table for other tools, in Parquet or Arrow IPC format, on the device.

    id  captured_at  model_version  held_out  label  output  input  input_shape

Rows are read in batches in one read transaction, while another process captures. ``input`` and ``output`` are
flattened lists of numbers; ``label`` is a number, or a list if any label is a list. It needs pyarrow:
``pip install 'fedbus[data]'``.
"""

import importlib.util
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from fedbus.common.filesystem import publish_file, temporary_file
from fedbus.stores.captured.reader import decode_array, is_held_out, read_transaction
from fedbus.stores.errors import StoreError, StoreUnavailable

FORMATS: Final = {".parquet": "Parquet", ".arrow": "Arrow"}
BATCH_ROWS: Final = 1000

_ROWS: Final = "SELECT id, captured_at, model_version, label, output, input FROM captured ORDER BY id"
_DISTINCT_HEADERS: Final = """
SELECT DISTINCT substr(input, 1, 128), substr(output, 1, 128) FROM captured
"""
WriteBatch: TypeAlias = Callable[[Any], None]


class ExportFailed(StoreError):
    """The export cannot be written in this format, or pyarrow is missing."""


def export(
    database: Path,
    path: Path,
    *,
    holdout_share: float = 0.0,
    labelled: bool = False,
    on_batch: Callable[[int], None] = lambda _: None,
) -> int:
    """Write all rows, or only the *labelled* ones, to *path* atomically. Returns the number of rows. Blocks.

    *on_batch* is called with the number of rows of each batch.
    Raises ExportFailed for an unknown format or without pyarrow, and StoreUnavailable.
    """
    check_format(path)
    with read_transaction(database) as connection:
        schema = _arrow_schema(connection)
        batches = _iter_batches(connection, schema, holdout_share, labelled=labelled)
        with _new_file(path) as part, _open_writer(part, path.suffix, schema) as write:
            return _write_batches(batches, write, on_batch)


def check_format(path: Path) -> None:
    """Raise ExportFailed if the suffix of *path* is unknown or pyarrow is missing."""
    if path.suffix not in FORMATS:
        known = " or ".join(FORMATS)
        raise ExportFailed(f"unknown format of {path.name}; use the suffix {known}")
    if importlib.util.find_spec("pyarrow") is None:
        raise ExportFailed("the export needs pyarrow; pip install 'fedbus[data]'")


def _write_batches(batches: Iterator[Any], write: WriteBatch, on_batch: Callable[[int], None]) -> int:
    count = 0
    for batch in batches:
        write(batch)
        count += batch.num_rows
        on_batch(batch.num_rows)
    return count


def _arrow_schema(connection: sqlite3.Connection) -> Any:
    """Return the Arrow schema, with number types that fit all rows."""
    import pyarrow as pa  # noqa: PLC0415 - an extra

    inputs, outputs = _common_dtypes(connection)
    lists = any(
        isinstance(json.loads(label), list)
        for (label,) in connection.execute(
            "SELECT DISTINCT label FROM captured WHERE label LIKE '[%' LIMIT 1"
        )
    )
    return pa.schema(
        [
            ("id", pa.int64()),
            ("captured_at", pa.timestamp("us", tz="UTC")),
            ("model_version", pa.int64()),
            ("held_out", pa.bool_()),
            ("label", pa.list_(pa.float64()) if lists else pa.float64()),
            ("output", pa.list_(pa.from_numpy_dtype(outputs))),
            ("input", pa.list_(pa.from_numpy_dtype(inputs))),
            ("input_shape", pa.list_(pa.int64())),
        ]
    )


def _common_dtypes(connection: sqlite3.Connection) -> tuple["np.dtype[Any]", "np.dtype[Any]"]:
    """Return the common types of all inputs and of all outputs, from the headers of the rows."""
    inputs, outputs = {np.dtype(np.float32)}, {np.dtype(np.float32)}
    headers = connection.execute(_DISTINCT_HEADERS).fetchall()
    if headers:
        inputs, outputs = (
            {_read_dtype(header) for header in column} for column in zip(*headers, strict=True)
        )
    return np.result_type(*inputs), np.result_type(*outputs)


def _read_dtype(header: bytes) -> "np.dtype[Any]":
    """Return the dtype in the header of an .npy file."""
    text = header[10:].decode("latin-1")
    return np.dtype(text.partition("'descr': '")[2].partition("'")[0])


def _iter_batches(
    connection: sqlite3.Connection, schema: Any, holdout_share: float, *, labelled: bool
) -> Iterator[Any]:
    import pyarrow as pa  # noqa: PLC0415 - an extra

    cursor = connection.execute(_ROWS)
    lists = pa.types.is_list(schema.field("label").type)
    while rows := cursor.fetchmany(BATCH_ROWS):
        selected = [row for row in rows if not labelled or row[3] is not None]
        records = [_to_record(row, holdout_share, lists=lists) for row in selected]
        yield pa.RecordBatch.from_pylist(records, schema=schema)


def _to_record(row: Any, holdout_share: float, *, lists: bool) -> dict[str, Any]:
    row_id, captured_at, version, label_text, output, content = row
    sample = decode_array(content)
    label = None if label_text is None else json.loads(label_text)
    return {
        "id": row_id,
        "captured_at": int(captured_at * 1e6),
        "model_version": version,
        "held_out": is_held_out(row_id, holdout_share),
        "label": [label] if lists and label is not None and not isinstance(label, list) else label,
        "output": decode_array(output).ravel().tolist(),
        "input": sample.ravel().tolist(),
        "input_shape": list(sample.shape),
    }


@contextmanager
def _open_writer(part: Path, suffix: str, schema: Any) -> Iterator[WriteBatch]:
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    with pq.ParquetWriter(part, schema) if suffix == ".parquet" else pa.ipc.new_file(part, schema) as writer:
        yield writer.write_batch


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Create a temporary file that replaces *path* if the block succeeds."""
    try:
        with temporary_file(path) as part:
            yield part
            publish_file(part, path)
    except OSError as error:
        raise StoreUnavailable(path.parent, error) from error
