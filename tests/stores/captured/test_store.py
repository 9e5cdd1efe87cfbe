"""Captured data: bounded, never delays a prediction, and survives kill -9."""

import asyncio
import math
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import eventually

from fedbus.stores.captured import database as database_module
from fedbus.stores.captured import store as store_module
from fedbus.stores.captured.database import UNLABELLED_SHARE, CapturedDatabase, CapturedRow
from fedbus.stores.captured.reader import (
    Label,
    RowCounts,
    TotalCounts,
    count_rows,
    encode_array,
    is_held_out,
    read_holdout_rows,
    read_labelled_rows,
    read_newest_rows,
    read_row_counts,
    read_total_counts,
    read_training_rows,
    write_training_data,
)
from fedbus.stores.captured.store import CapturedData, CaptureStats, LabelConflict, UnknownRow
from fedbus.stores.errors import StoreCorrupt, StoreUnavailable

ADDS_FOREVER = """
import asyncio, sys
from pathlib import Path
import numpy as np
from fedbus.stores.captured.store import CapturedData
async def main():
    captured = CapturedData(Path(sys.argv[1]))
    while True:
        ids = [captured.add(np.full(4, n, np.float32), np.int64(n), n, model_version=1) for n in range(50)]
        await captured.counts()  # committed
        print(ids[-1], flush=True)
asyncio.run(main())
"""
OUTPUT = np.int64(7)


def sample(value: float = 0.0) -> np.ndarray:
    return np.full((2, 3), value, np.float32)


def add(captured: CapturedData, value: float, label: Label | None = None) -> int:
    row = captured.add(sample(value), np.asarray(OUTPUT), label, model_version=1)
    assert row is not None
    return row


async def export_labelled(captured: CapturedData, path: Path) -> int:
    """Write all labelled rows to *path*, and return their number."""
    await captured.flush()
    return write_training_data(path, *read_labelled_rows(captured.path))


@pytest.fixture
async def captured(tmp_path: Path) -> AsyncIterator[CapturedData]:
    captured = CapturedData(tmp_path / "captured.db", max_rows=100)
    yield captured
    await captured.close()


async def test_added_rows_are_counted(captured: CapturedData) -> None:
    add(captured, 1.0)
    add(captured, 2.0, label=3)
    assert await captured.counts() == CaptureStats(rows=2, labelled=1, dropped=0)


async def test_labelled_rows_are_read_as_arrays(captured: CapturedData, tmp_path: Path) -> None:
    add(captured, 1.0, label=4)
    add(captured, 2.0)
    await captured.label(add(captured, 3.0), 5)
    assert await export_labelled(captured, tmp_path / "data.npz") == 2
    with np.load(tmp_path / "data.npz", allow_pickle=False) as data:
        assert data["inputs"].tolist() == [sample(1.0).tolist(), sample(3.0).tolist()]
        assert data["inputs"].dtype == np.float32
        assert data["labels"].tolist() == [4, 5]


async def test_a_label_may_be_a_list(captured: CapturedData, tmp_path: Path) -> None:
    add(captured, 1.0, label=[0.5, 1.5])
    assert await export_labelled(captured, tmp_path / "data.npz") == 1
    with np.load(tmp_path / "data.npz", allow_pickle=False) as data:
        assert data["labels"].tolist() == [[0.5, 1.5]]


async def test_without_a_label_there_is_no_file(captured: CapturedData, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"of an earlier run")
    add(captured, 1.0)
    assert await export_labelled(captured, tmp_path / "data.npz") == 0
    assert sorted(path.suffix for path in files_in(tmp_path)) == [".db", ".db-shm", ".db-wal"]


async def test_rows_of_an_older_shape_are_left_out(captured: CapturedData, tmp_path: Path) -> None:
    captured.add(np.zeros(5, np.float32), OUTPUT, 1, model_version=1)
    add(captured, 1.0, label=2)
    assert await export_labelled(captured, tmp_path / "data.npz") == 1


def files_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


async def test_a_label_can_be_repeated_but_not_changed(captured: CapturedData) -> None:
    row = add(captured, 1.0)
    await captured.label(row, 3)
    await captured.label(row, 3)
    with pytest.raises(LabelConflict) as conflict:
        await captured.label(row, 4)
    assert conflict.value.label == 3


async def test_an_unknown_row_cannot_be_labelled(captured: CapturedData) -> None:
    with pytest.raises(UnknownRow, match="id 12"):
        await captured.label(12, 1)


async def test_the_oldest_unlabelled_rows_are_evicted(captured: CapturedData, tmp_path: Path) -> None:
    labelled = [add(captured, n, label=n) for n in range(10)]
    unlabelled = [add(captured, n) for n in range(150)]
    assert await captured.counts() == CaptureStats(rows=100, labelled=10, dropped=0)
    with pytest.raises(UnknownRow):
        await captured.label(unlabelled[59], 1)
    await captured.label(unlabelled[60], 1)
    assert await export_labelled(captured, tmp_path / "data.npz") == len(labelled) + 1


@given(
    max_rows=st.integers(2, 40),
    batches=st.lists(st.lists(st.booleans(), min_size=1, max_size=50), min_size=1, max_size=12),
    feedback=st.integers(0, 10),
)
@settings(max_examples=50, deadline=None)
def test_eviction_keeps_the_newest_rows_and_most_labelled_rows(
    tmp_path_factory: pytest.TempPathFactory, max_rows: int, batches: list[list[bool]], feedback: int
) -> None:
    path = tmp_path_factory.mktemp("law") / "captured.db"
    database = CapturedDatabase(path, max_rows=max_rows, max_bytes=1024**3, holdout_share=0)
    reserved, added, present = math.ceil(UNLABELLED_SHARE * max_rows), 0, dict[int, bool]()
    for batch in batches:
        rows = {added + n: labelled for n, labelled in enumerate(batch)}
        database.insert([bare_row(row, labelled=labelled) for row, labelled in rows.items()])
        added, before, present = added + len(rows), present | rows, read_labelled_flags(path)
        assert len(present) == min(len(before), max_rows), "no row is evicted without need"
        newest = min(reserved, max_rows - reserved, added)
        assert present.keys() >= set(range(added - newest, added)), "the newest rows are present"
        unlabelled = [row for row, labelled in present.items() if not labelled]
        if any(labelled and row not in present for row, labelled in before.items()):
            assert len(unlabelled) <= reserved, "a labelled row is evicted only then"
        for row in unlabelled[:feedback]:
            database.label(row, 1)
            present[row] = True
    database.close()


def bare_row(id: int, *, labelled: bool) -> CapturedRow:
    return CapturedRow(
        id, 1 if labelled else None, 1, time.time(), encode_array(OUTPUT), encode_array(sample())
    )


def read_labelled_flags(path: Path) -> dict[int, bool]:
    """Return for each row whether it has a label."""
    with closing(sqlite3.connect(path)) as database:
        return dict(database.execute("SELECT id, label IS NOT NULL FROM captured ORDER BY id"))


async def test_a_store_full_of_labelled_rows_accepts_feedback_for_new_rows(
    captured: CapturedData,
) -> None:
    for n in range(100):
        add(captured, n, label=n)
    for n in range(100):
        row = add(captured, n)
        await captured.flush()
        await captured.label(row, n)
    assert await captured.counts() == CaptureStats(rows=100, labelled=100, dropped=0)


async def test_if_all_rows_are_labelled_the_oldest_are_evicted(captured: CapturedData) -> None:
    rows = [add(captured, n, label=n) for n in range(130)]
    assert (await captured.counts()).rows == 100
    with pytest.raises(UnknownRow):
        await captured.label(rows[29], 29)
    await captured.label(rows[30], 30)


async def test_ids_are_not_reused_after_a_restart(tmp_path: Path) -> None:
    before = CapturedData(tmp_path / "captured.db")
    first = add(before, 1.0)
    await before.close()
    after = CapturedData(tmp_path / "captured.db")
    assert add(after, 2.0) > first
    assert (await after.counts()).rows == 2
    await after.close()


FILLS_THE_DISK = """
import asyncio, resource, statistics, sys, time
from pathlib import Path
import numpy as np
from fedbus.stores.captured.store import CapturedData

def limit(size):  # the kernel rejects every write beyond it, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    reports = []
    captured = CapturedData(
        Path(sys.argv[1]), retry_s=0.05, on_failure=reports.append, on_recovery=lambda: reports.append("resumed")
    )
    add = lambda: captured.add(np.zeros(2000, np.float32), np.int64(7), 3, model_version=1)
    first = add()
    await captured.flush()
    limit(400_000)
    seconds = []
    while not reports:
        start = time.monotonic()
        add()
        seconds.append(time.monotonic() - start)
        await asyncio.sleep(0.001)
    assert statistics.median(seconds) < 0.1, "predictions waited for the disk"  # the process may have paused once
    paused = await captured.counts()
    assert paused.dropped > 0 and paused.rows >= 1
    assert "predictions go on" in reports[0], reports
    await captured.label(first, 3)  # it has this label already, so that nothing has to be written
    limit(resource.RLIM_INFINITY)
    while reports[-1] != "resumed" or (await captured.counts()).rows <= paused.rows:
        add()
        await asyncio.sleep(0.01)
    assert "resumed" not in reports[::2] and set(reports[1::2]) == {"resumed"}, reports
    await captured.label(first, 3)
    await captured.close()
    print("ok")
asyncio.run(main())
"""


async def test_a_full_disk_pauses_capture_and_not_the_predictions(
    tmp_path: Path,
) -> None:
    program = [sys.executable, "-c", FILLS_THE_DISK, str(tmp_path / "captured.db")]
    child = await asyncio.create_subprocess_exec(*program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = await child.communicate()
    assert out == b"ok\n", err.decode()
    with sqlite3.connect(tmp_path / "captured.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


async def test_the_oldest_rows_are_evicted_at_the_limit_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "captured.db"
    captured = CapturedData(path, max_bytes=1024**2)
    big = np.zeros(2000, np.float32)
    labelled = captured.add(big, OUTPUT, 1, model_version=1)
    for _ in range(1000):
        await captured.flush()
        newest = captured.add(big, OUTPUT, model_version=1)
    assert labelled is not None
    assert newest is not None
    counts = await captured.counts()
    assert counts.dropped == 0
    assert 50 < counts.rows < 130
    await captured.label(labelled, 1)
    await captured.label(newest, 1)
    await captured.close()
    assert path.stat().st_size <= 1024**2


async def test_rows_that_are_too_old_are_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed_s = 0.0
    clock = SimpleNamespace(
        time=lambda: time.time() + passed_s, monotonic=lambda: time.monotonic() + passed_s, sleep=time.sleep
    )
    for module in (store_module, database_module):
        monkeypatch.setattr(module, "time", clock)
    captured = CapturedData(tmp_path / "captured.db", max_age_s=3600)
    row = add(captured, 1.0, label=1)
    assert (await captured.counts()).rows == 1

    passed_s = 3600.0
    await captured.flush()  # the writer evicts old rows before it waits for the next job
    assert (await captured.counts()).rows == 0
    with pytest.raises(UnknownRow):
        await captured.label(row, 1)
    add(captured, 2.0)
    assert (await captured.counts()).rows == 1
    await captured.close()


async def test_held_out_rows_are_not_training_data(captured: CapturedData, tmp_path: Path) -> None:
    for n in range(100):
        add(captured, float(n), label=n)
    await captured.flush()
    database = tmp_path / "captured.db"
    _, labels = read_labelled_rows(database, holdout_share=0.2)
    training = set(labels.tolist())
    held_out = set(read_holdout_rows(database, 0.2, 100).labels)
    assert training | held_out == set(range(100))
    assert not training & held_out
    assert len(held_out) == 100 - len(labels)
    assert 10 <= len(held_out) <= 30
    counts = read_row_counts(database, 0.2)
    assert (counts.labelled, counts.unlabelled, counts.holdout) == (len(labels), 0, len(held_out))


async def test_total_counts_survive_eviction_and_restarts(tmp_path: Path) -> None:
    path, share = tmp_path / "captured.db", 0.2
    captured = CapturedData(path, max_rows=20, holdout_share=share)
    labelled = [add(captured, n, label=n) for n in range(50)]
    unlabelled = [add(captured, n) for n in range(50)]
    await captured.label(unlabelled[-1], 1)
    await captured.label(unlabelled[-1], 1)  # a repeated label is not counted
    await captured.close()
    captured = CapturedData(path, max_rows=20, holdout_share=share)
    counts = read_total_counts(path)
    trainable = [row for row in (*labelled, unlabelled[-1]) if not is_held_out(row, share)]
    assert counts.labelled == len(trainable)
    assert counts.unlabelled == len([row for row in unlabelled if not is_held_out(row, share)])
    await captured.close()
    path.unlink()
    captured = CapturedData(path)
    new_counts = read_total_counts(path)
    assert (new_counts.labelled, new_counts.unlabelled) == (0, 0)
    assert new_counts.database != counts.database
    await captured.close()


async def test_a_database_without_total_counts_starts_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "captured.db"
    captured = CapturedData(path)
    add(captured, 1.0, label=1)
    add(captured, 2.0)
    await captured.close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE ever")
    captured = CapturedData(path)
    assert (read_total_counts(path).labelled, read_total_counts(path).unlabelled) == (1, 1)
    await captured.close()


async def test_feedback_waits_for_the_disk_and_predictions_do_not(captured: CapturedData) -> None:
    """Reads ``PRAGMA synchronous`` during each write: 1 is NORMAL, 2 is FULL (fsync at each commit)."""
    levels: list[int] = []
    insert, label = CapturedDatabase.insert, CapturedDatabase.label

    def record_level(database: CapturedDatabase) -> None:
        levels.append(database._connection.execute("PRAGMA synchronous").fetchone()[0])

    def record_insert(database: CapturedDatabase, rows: list[CapturedRow]) -> None:
        record_level(database)
        insert(database, rows)

    def record_label(database: CapturedDatabase, row: int, value: Label) -> None:
        record_level(database)
        label(database, row, value)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CapturedDatabase, "insert", record_insert)
        patched.setattr(CapturedDatabase, "label", record_label)
        for n in range(3):
            row = add(captured, n)
            await captured.label(row, n)
    assert levels == [1, 2] * 3


async def test_a_task_can_read_rows_without_a_label(captured: CapturedData, tmp_path: Path) -> None:
    add(captured, 1.0)
    add(captured, 2.0, label=5)
    await captured.flush()
    rows = read_training_rows(tmp_path / "captured.db")
    assert rows.labels == [None, 5]
    assert rows.outputs.tolist() == [7, 7]
    newest = read_newest_rows(tmp_path / "captured.db", 1)
    assert newest.inputs.tolist() == [sample(2.0).tolist()]


async def test_capture_is_retried_after_a_while(tmp_path: Path) -> None:
    failed = threading.Event()
    path = tmp_path / "captured.db"
    captured = CapturedData(path, retry_s=0.05, on_failure=lambda _: failed.set())
    add(captured, 1.0)
    await captured.flush()
    await captured.flush()  # after the first eviction of old rows too, which would otherwise be what fails
    other = sqlite3.connect(path)
    other.execute("ALTER TABLE captured RENAME TO elsewhere")
    add(captured, 2.0)
    await eventually(failed.is_set)
    other.execute("ALTER TABLE elsewhere RENAME TO captured")
    other.close()
    await eventually(lambda: captured.add(sample(), OUTPUT, model_version=1) is not None)
    counts = await captured.counts()
    assert (counts.rows, counts.dropped >= 1) == (2, True)
    await captured.close()


async def test_capture_resumes_as_soon_as_queued_rows_are_written(tmp_path: Path) -> None:
    reports: list[str] = []
    path = tmp_path / "captured.db"

    def restore_table(reason: str) -> None:
        reports.append(reason)
        with closing(sqlite3.connect(path)) as other:
            other.execute("ALTER TABLE elsewhere RENAME TO captured")

    captured = CapturedData(
        path, retry_s=3600, on_failure=restore_table, on_recovery=lambda: reports.append("resumed")
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # the writer waits now
        other.execute("ALTER TABLE captured RENAME TO elsewhere")
        for value in range(1000):  # several batches: the first is lost, the next are written
            add(captured, float(value))
        other.execute("COMMIT")
    await eventually(lambda: reports[1:] == ["resumed"])
    assert captured.add(sample(), OUTPUT, model_version=1) is not None
    await captured.close()


@pytest.mark.parametrize("limit", [{"max_queued_rows": 100}, {"max_queued_bytes": 20_000}], ids=str)
async def test_a_slow_writer_drops_rows_and_does_not_use_more_memory(
    tmp_path: Path, limit: dict[str, int]
) -> None:
    path = tmp_path / "captured.db"
    captured = CapturedData(path, **limit)  # type: ignore[arg-type]  # both are numbers
    with sqlite3.connect(path) as other:
        other.execute("BEGIN IMMEDIATE")  # the writer waits now
        ids = [captured.add(sample(), OUTPUT, model_version=1) for _ in range(2000)]
    other.close()
    assert ids.count(None) > 1500
    counts = await captured.counts()
    assert counts == CaptureStats(rows=2000 - ids.count(None), labelled=0, dropped=ids.count(None))
    await captured.close()


async def test_adding_never_waits_for_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "captured.db"
    captured = CapturedData(path)
    with sqlite3.connect(path) as other:
        other.execute("BEGIN IMMEDIATE")
        seconds = []
        for _ in range(1000):
            start = time.monotonic()
            captured.add(sample(), OUTPUT, model_version=1)
            seconds.append(time.monotonic() - start)
        assert statistics.median(seconds) < 0.01  # the process may have paused once
    other.close()
    await captured.close()


async def test_a_closed_store_rejects_rows_and_calls(tmp_path: Path) -> None:
    captured = CapturedData(tmp_path / "captured.db")
    await captured.close()
    await captured.close()
    assert captured.add(sample(), OUTPUT, model_version=1) is None
    with pytest.raises(StoreUnavailable, match="closed"):
        await captured.counts()


async def test_closing_writes_the_queued_rows(tmp_path: Path) -> None:
    captured = CapturedData(tmp_path / "captured.db")
    for n in range(1000):
        add(captured, n, label=n)
    await captured.close()
    assert await asyncio.to_thread(count_rows, tmp_path / "captured.db") == 1000
    _, labels = await asyncio.to_thread(read_labelled_rows, tmp_path / "captured.db")
    assert len(labels) == 1000


async def test_committed_rows_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "captured.db"
    writer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ADDS_FOREVER, str(path)), stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    last = [int(await writer.stdout.readline()) for _ in range(20)][-1]
    writer.send_signal(signal.SIGKILL)
    await writer.wait()
    captured = CapturedData(path)
    counts = await captured.counts()
    assert counts.rows >= 20 * 50
    with pytest.raises(LabelConflict):  # the last row exists, with its label
        await captured.label(last, 1)
    new = add(captured, 0.0)
    assert new > last + 1_000_000
    await captured.close()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


async def test_another_process_can_read_while_rows_are_added(captured: CapturedData, tmp_path: Path) -> None:
    add(captured, 1.0, label=1)
    await captured.counts()
    command = [sys.executable, "-c", COUNTS_LABELLED, str(tmp_path / "captured.db")]
    reader = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    add(captured, 2.0, label=2)
    output, _ = await reader.communicate()
    assert int(output) in (1, 2)


COUNTS_LABELLED = """
import sys
from pathlib import Path
from fedbus.stores.captured.reader import read_labelled_rows
print(len(read_labelled_rows(Path(sys.argv[1]))[1]))
"""


def test_a_database_can_be_read_as_soon_as_its_file_exists(tmp_path: Path) -> None:
    paths = [tmp_path / f"captured-{number}.db" for number in range(50)]
    counts: list[tuple[int, RowCounts, TotalCounts]] = []

    def read_each() -> None:
        for path in paths:
            while not path.exists():
                pass
            counts.append((count_rows(path), read_row_counts(path, 0.5), read_total_counts(path)))

    reader = threading.Thread(target=read_each)
    reader.start()
    for path in paths:
        CapturedDatabase(path, max_rows=10, max_bytes=2**20, holdout_share=0.5).close()
    reader.join(timeout=30)
    assert [(rows, total.labelled) for rows, _, total in counts] == [(0, 0)] * len(paths)


async def test_a_file_that_is_not_a_database_is_corrupt(tmp_path: Path) -> None:
    shutil.copy(sys.executable, tmp_path / "captured.db")
    with pytest.raises(StoreCorrupt, match="is corrupt"):
        CapturedData(tmp_path / "captured.db")


async def test_a_path_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="cannot use"):
        CapturedData(Path("/proc/nowhere/captured.db"))
