"""`fedbus data`: list the captured rows of a device and export them."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.cli import CliResult, run_fedbus

from fedbus.stores.captured.reader import is_held_out
from fedbus.stores.captured.store import CapturedData

SHARE = 0.5


async def capture_rows(home: Path, client: str, labels: list[int | float | list[float] | None]) -> None:
    store = CapturedData(home / "clients" / client / "mnist" / "captured.db", holdout_share=SHARE)
    for n, label in enumerate(labels):
        store.add(np.full((2, 2), n, np.float32), np.int64(n), label, model_version=3)
    await store.close()


def run_cli(home: Path, *arguments: str | Path) -> CliResult:
    environment = {"FEDBUS_HOME": str(home), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return run_fedbus(*map(str, arguments), environment=environment)


def files_in(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


async def test_ls_counts_rows_and_labels(tmp_path: Path) -> None:
    assert "no captured rows" in run_cli(tmp_path, "data", "ls").err
    await capture_rows(tmp_path, "c1", [1, None, 2])
    await capture_rows(tmp_path, "c2", [None])
    listed = run_cli(tmp_path, "data", "ls", "--json").facts
    assert [(one["client"], one["task"], one["rows"], one["labelled"]) for one in listed] == [
        ("c1", "mnist", 3, 2),
        ("c2", "mnist", 1, 0),
    ]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
async def test_export_writes_a_table(tmp_path: Path, suffix: str) -> None:
    await capture_rows(tmp_path, "c1", [1, None, 0.5])
    path = tmp_path / f"rows.{suffix}"
    done = run_cli(tmp_path, "data", "export", path)
    assert done.out.startswith(f"exported 3 rows of c1/mnist to {path}"), done
    table = pq.read_table(path) if suffix == "parquet" else pa.ipc.open_file(str(path)).read_all()
    assert table["label"].to_pylist() == [1.0, None, 0.5]
    assert table["output"].to_pylist() == [[0], [1], [2]]
    assert table["input"].to_pylist()[2] == [2.0] * 4
    assert table["input_shape"].to_pylist()[0] == [2, 2]
    assert table["model_version"].to_pylist() == [3] * 3
    assert table["held_out"].to_pylist() == [is_held_out(row, SHARE) for row in table["id"].to_pylist()]
    assert table["captured_at"].to_pylist()[0].tzinfo is not None
    assert table.schema.field("input").type.value_type == pa.float32()


async def test_an_old_database_requires_the_holdout_option(
    tmp_path: Path,
) -> None:
    await capture_rows(tmp_path, "c1", [1, 2, 3])
    path = tmp_path / "rows.parquet"
    assert run_cli(tmp_path, "data", "export", path, "--holdout", "1").code == 0
    assert pq.read_table(path)["held_out"].to_pylist() == [True] * 3
    with closing(sqlite3.connect(tmp_path / "clients" / "c1" / "mnist" / "captured.db")) as database:
        database.execute("DROP TABLE ever")
    unknown = run_cli(tmp_path, "data", "export", path)
    assert (unknown.code, "for example --holdout 0.2" in unknown.err) == (2, True)
    assert run_cli(tmp_path, "data", "export", path, "--holdout", "0").code == 0
    assert pq.read_table(path)["held_out"].to_pylist() == [False] * 3


async def test_rows_in_the_write_ahead_log_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "clients" / "c1" / "mnist" / "captured.db"
    store = CapturedData(path)
    for n in range(60):
        store.add(np.zeros(1000, np.float32), np.int64(n), model_version=1)
    await store.flush()
    (listed,) = run_cli(tmp_path, "data", "ls", "--json").facts
    assert listed["size_bytes"] > 60 * 4000 > path.stat().st_size
    await store.close()


async def test_labelled_exports_only_labelled_rows(tmp_path: Path) -> None:
    await capture_rows(tmp_path, "c1", [[0.5, 0.5], None, 2])
    assert run_cli(tmp_path, "data", "export", tmp_path / "rows.parquet", "--labelled").code == 0
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table["label"].to_pylist() == [[0.5, 0.5], [2.0]]


async def test_rows_are_exported_while_more_are_captured(tmp_path: Path) -> None:
    store = CapturedData(tmp_path / "clients" / "c1" / "mnist" / "captured.db")
    for n in range(3000):
        store.add(np.zeros(4, np.float32), np.int64(n), model_version=1)
    await store.flush()
    store.add(np.zeros(4, np.float32), np.int64(0), model_version=1)
    assert run_cli(tmp_path, "data", "export", tmp_path / "rows.parquet").code == 0
    assert pq.read_table(tmp_path / "rows.parquet").num_rows in (3000, 3001)
    await store.close()


async def test_a_failed_export_is_one_line(tmp_path: Path) -> None:
    missing = run_cli(tmp_path, "data", "export", tmp_path / "rows.parquet")
    assert (missing.code, "no captured rows of such a client" in missing.err) == (5, True)
    await capture_rows(tmp_path, "c1", [1])
    await capture_rows(tmp_path, "c2", [1])
    several = run_cli(tmp_path, "data", "export", tmp_path / "rows.parquet")
    assert (several.code, "c1/mnist, c2/mnist" in several.err) == (2, True)
    strange = run_cli(tmp_path, "data", "export", tmp_path / "rows.csv", "--client", "c1")
    assert (strange.code, ".parquet or .arrow" in strange.err) == (1, True)
    nowhere = run_cli(tmp_path, "data", "export", "/nowhere/rows.parquet", "--client", "c1")
    assert nowhere.code == 6
    assert nowhere.err.startswith(
        "fedbus: cannot use /nowhere: No such file or directory; make it a directory"
    )
    assert files_in(tmp_path) == ["clients"]
