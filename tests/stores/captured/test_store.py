"""Captured data: bounded, never in the way of a prediction, and there after kill -9."""

import asyncio
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import eventually

from fedbus.stores.captured.database import UNLABELLED_SHARE, CapturedDatabase, CapturedRow
from fedbus.stores.captured.reader import (
    Label,
    count_rows,
    encode_array,
    is_held_out,
    read_holdout_rows,
    read_newest_rows,
    read_row_counts,
    read_total_counts,
    read_training_rows,
    snapshot_labelled,
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
ANSWER = np.int64(7)


def sample(value: float = 0.0) -> np.ndarray:
    return np.full((2, 3), value, np.float32)


def add(captured: CapturedData, value: float, label: Label | None = None) -> int:
    row = captured.add(sample(value), np.asarray(ANSWER), label, model_version=1)
    assert row is not None
    return row


@pytest.fixture
async def captured(tmp_path: Path) -> AsyncIterator[CapturedData]:
    captured = CapturedData(tmp_path / "captured.db", max_rows=100)
    yield captured
    await captured.close()


async def test_what_was_added_is_counted(captured: CapturedData) -> None:
    add(captured, 1.0)
    add(captured, 2.0, label=3)
    assert await captured.counts() == CaptureStats(rows=2, labelled=1, dropped=0)


async def test_labelled_rows_come_out_as_arrays(captured: CapturedData, tmp_path: Path) -> None:
    add(captured, 1.0, label=4)
    add(captured, 2.0)
    await captured.label(add(captured, 3.0), 5)
    assert await captured.snapshot_labelled(tmp_path / "data.npz") == 2
    with np.load(tmp_path / "data.npz", allow_pickle=False) as data:
        assert data["inputs"].tolist() == [sample(1.0).tolist(), sample(3.0).tolist()]
        assert data["inputs"].dtype == np.float32
        assert data["labels"].tolist() == [4, 5]


async def test_a_label_may_be_a_list(captured: CapturedData, tmp_path: Path) -> None:
    add(captured, 1.0, label=[0.5, 1.5])
    assert await captured.snapshot_labelled(tmp_path / "data.npz") == 1
    with np.load(tmp_path / "data.npz", allow_pickle=False) as data:
        assert data["labels"].tolist() == [[0.5, 1.5]]


async def test_without_a_label_there_is_no_file(captured: CapturedData, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"of an earlier run")
    add(captured, 1.0)
    assert await captured.snapshot_labelled(tmp_path / "data.npz") == 0
    assert sorted(path.suffix for path in files_in(tmp_path)) == [".db", ".db-shm", ".db-wal"]


async def test_rows_of_another_shape_than_the_newest_are_left_out(
    captured: CapturedData, tmp_path: Path
) -> None:
    captured.add(np.zeros(5, np.float32), ANSWER, 1, model_version=1)
    add(captured, 1.0, label=2)
    assert await captured.snapshot_labelled(tmp_path / "data.npz") == 1


def files_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


async def test_a_label_may_be_said_twice_but_not_changed(captured: CapturedData) -> None:
    row = add(captured, 1.0)
    await captured.label(row, 3)
    await captured.label(row, 3)
    with pytest.raises(LabelConflict) as refused:
        await captured.label(row, 4)
    assert refused.value.label == 3


async def test_a_row_that_was_never_there_cannot_be_labelled(captured: CapturedData) -> None:
    with pytest.raises(UnknownRow, match="id 12"):
        await captured.label(12, 1)


async def test_the_oldest_unlabelled_rows_make_room(captured: CapturedData, tmp_path: Path) -> None:
    labelled = [add(captured, n, label=n) for n in range(10)]
    unlabelled = [add(captured, n) for n in range(150)]
    assert await captured.counts() == CaptureStats(rows=100, labelled=10, dropped=0)
    with pytest.raises(UnknownRow):
        await captured.label(unlabelled[59], 1)
    await captured.label(unlabelled[60], 1)
    assert await captured.snapshot_labelled(tmp_path / "data.npz") == len(labelled) + 1


@given(
    max_rows=st.integers(2, 40),
    batches=st.lists(st.lists(st.booleans(), min_size=1, max_size=50), min_size=1, max_size=12),
    feedback=st.integers(0, 10),
)
@settings(max_examples=50, deadline=None)
def test_what_just_came_is_there_and_labelled_rows_go_only_where_few_wait_for_a_label(
    tmp_path_factory: pytest.TempPathFactory, max_rows: int, batches: list[list[bool]], feedback: int
) -> None:
    path = tmp_path_factory.mktemp("law") / "captured.db"
    database = CapturedDatabase(path, max_rows=max_rows, max_bytes=1024**3, holdout_share=0)
    waiting, came, there = math.ceil(UNLABELLED_SHARE * max_rows), 0, dict[int, bool]()
    for batch in batches:
        rows = {came + n: labelled for n, labelled in enumerate(batch)}
        database.insert([bare_row(row, labelled=labelled) for row, labelled in rows.items()])
        came, before, there = came + len(rows), there | rows, labelled_in(path)
        assert len(there) == min(len(before), max_rows), "no more go than have to"
        newest = min(waiting, max_rows - waiting, came)
        assert there.keys() >= set(range(came - newest, came)), "what just came is there"
        unlabelled = [row for row, labelled in there.items() if not labelled]
        if any(labelled and row not in there for row, labelled in before.items()):
            assert len(unlabelled) <= waiting, "labelled ones go only then"
        for row in unlabelled[:feedback]:
            database.label(row, 1)
            there[row] = True
    database.close()


def bare_row(id: int, *, labelled: bool) -> CapturedRow:
    return CapturedRow(
        id, 1 if labelled else None, 1, time.time(), encode_array(ANSWER), encode_array(sample())
    )


def labelled_in(path: Path) -> dict[int, bool]:
    """Of each row that is there, whether it has a label."""
    with closing(sqlite3.connect(path)) as database:
        return dict(database.execute("SELECT id, label IS NOT NULL FROM captured ORDER BY id"))


async def test_a_store_full_of_labelled_rows_takes_feedback_to_what_comes_next(
    captured: CapturedData,
) -> None:
    for n in range(100):
        add(captured, n, label=n)
    for n in range(100):
        row = add(captured, n)
        await captured.written()
        await captured.label(row, n)
    assert await captured.counts() == CaptureStats(rows=100, labelled=100, dropped=0)


async def test_where_all_are_labelled_the_oldest_make_room(captured: CapturedData) -> None:
    rows = [add(captured, n, label=n) for n in range(130)]
    assert (await captured.counts()).rows == 100
    with pytest.raises(UnknownRow):
        await captured.label(rows[29], 29)
    await captured.label(rows[30], 30)


async def test_ids_are_not_given_out_again_after_a_restart(tmp_path: Path) -> None:
    before = CapturedData(tmp_path / "captured.db")
    first = add(before, 1.0)
    await before.close()
    after = CapturedData(tmp_path / "captured.db")
    assert add(after, 2.0) > first
    assert (await after.counts()).rows == 2
    await after.close()


FILLS_THE_DISK = """
import asyncio, resource, sys, time
from pathlib import Path
import numpy as np
from fedbus.stores.captured.store import CapturedData

def limit(size):  # the kernel refuses every write beyond it, as it does on a disk that is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    said = []
    captured = CapturedData(
        Path(sys.argv[1]), retry_s=0.05, on_failure=said.append, on_recovery=lambda: said.append("goes on")
    )
    add = lambda: captured.add(np.zeros(2000, np.float32), np.int64(7), 3, model_version=1)
    first = add()
    await captured.written()
    limit(400_000)
    while not said:
        began = time.monotonic()
        add()
        assert time.monotonic() - began < 1, "a prediction waited for the disk"
        await asyncio.sleep(0.001)
    paused = await captured.counts()
    assert paused.dropped > 0 and paused.rows >= 1
    assert "predictions go on" in said[0], said
    await captured.label(first, 3)  # it is there and says so already: nothing has to be written
    limit(resource.RLIM_INFINITY)
    while said[-1] != "goes on" or (await captured.counts()).rows <= paused.rows:
        add()
        await asyncio.sleep(0.01)
    assert "goes on" not in said[::2] and set(said[1::2]) == {"goes on"}, said
    await captured.label(first, 3)
    await captured.close()
    print("ok")
asyncio.run(main())
"""


async def test_a_disk_that_is_full_stops_capture_and_not_the_predictions_until_there_is_space(
    tmp_path: Path,
) -> None:
    program = [sys.executable, "-c", FILLS_THE_DISK, str(tmp_path / "captured.db")]
    child = await asyncio.create_subprocess_exec(*program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = await child.communicate()
    assert out == b"ok\n", err.decode()
    with sqlite3.connect(tmp_path / "captured.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


async def test_as_many_bytes_are_kept_as_may_be_and_the_oldest_make_room(tmp_path: Path) -> None:
    path = tmp_path / "captured.db"
    captured = CapturedData(path, max_bytes=1024**2)
    big = np.zeros(2000, np.float32)
    labelled = captured.add(big, ANSWER, 1, model_version=1)
    for _ in range(1000):
        await captured.written()
        newest = captured.add(big, ANSWER, model_version=1)
    assert labelled is not None
    assert newest is not None
    counts = await captured.counts()
    assert counts.dropped == 0
    assert 50 < counts.rows < 130
    await captured.label(labelled, 1)
    await captured.label(newest, 1)
    await captured.close()
    assert path.stat().st_size <= 1024**2


async def test_what_is_too_old_is_let_go(tmp_path: Path) -> None:
    captured = CapturedData(tmp_path / "captured.db", max_age_s=0.5)
    row = add(captured, 1.0, label=1)
    assert (await captured.counts()).rows == 1

    async def gone() -> bool:
        return (await captured.counts()).rows == 0

    await eventually(gone)
    with pytest.raises(UnknownRow):
        await captured.label(row, 1)
    add(captured, 2.0)
    assert (await captured.counts()).rows == 1
    await captured.close()


async def test_what_is_held_out_is_in_no_training(captured: CapturedData, tmp_path: Path) -> None:
    for n in range(100):
        add(captured, float(n), label=n)
    await captured.written()
    database = tmp_path / "captured.db"
    trained = snapshot_labelled(database, tmp_path / "d.npz", holdout_share=0.2)
    with np.load(tmp_path / "d.npz") as data:
        training = set(data["labels"].tolist())
    judged = set(read_holdout_rows(database, 0.2, 100).labels)
    assert training | judged == set(range(100))
    assert not training & judged
    assert len(judged) == 100 - trained
    assert 10 <= len(judged) <= 30
    counted = read_row_counts(database, 0.2)
    assert (counted.labelled, counted.unlabelled, counted.holdout) == (trained, 0, len(judged))


async def test_what_came_is_counted_for_ever_whatever_makes_room_or_restarts(tmp_path: Path) -> None:
    path, share = tmp_path / "captured.db", 0.2
    captured = CapturedData(path, max_rows=20, holdout_share=share)
    with_label = [add(captured, n, label=n) for n in range(50)]
    without = [add(captured, n) for n in range(50)]
    await captured.label(without[-1], 1)
    await captured.label(without[-1], 1)  # the same once more is nothing new
    await captured.close()
    captured = CapturedData(path, max_rows=20, holdout_share=share)
    counted = read_total_counts(path)
    trained = [row for row in (*with_label, without[-1]) if not is_held_out(row, share)]
    assert counted.labelled == len(trained)
    assert counted.unlabelled == len([row for row in without if not is_held_out(row, share)])
    await captured.close()
    path.unlink()
    captured = CapturedData(path)
    anew = read_total_counts(path)
    assert (anew.labelled, anew.unlabelled) == (0, 0)
    assert anew.database != counted.database
    await captured.close()


async def test_a_database_of_before_there_was_a_count_begins_with_what_it_holds(tmp_path: Path) -> None:
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
    """What a power cut would show: how SQLite is told to wait, at the moment of each."""
    how: list[int] = []
    insert, label = CapturedDatabase.insert, CapturedDatabase.label

    def inserted(database: CapturedDatabase, rows: list[CapturedRow]) -> None:
        how.append(database.synchronous())
        insert(database, rows)

    def labelled(database: CapturedDatabase, row: int, truth: Label) -> None:
        how.append(database.synchronous())
        label(database, row, truth)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CapturedDatabase, "insert", inserted)
        patched.setattr(CapturedDatabase, "label", labelled)
        for n in range(3):
            row = add(captured, n)
            await captured.label(row, n)
    assert how == [1, 2] * 3


async def test_rows_without_a_label_are_there_for_a_task_that_wants_them(
    captured: CapturedData, tmp_path: Path
) -> None:
    add(captured, 1.0)
    add(captured, 2.0, label=5)
    await captured.written()
    rows = read_training_rows(tmp_path / "captured.db")
    assert rows.labels == [None, 5]
    assert rows.outputs.tolist() == [7, 7]
    newest = read_newest_rows(tmp_path / "captured.db", 1)
    assert newest.inputs.tolist() == [sample(2.0).tolist()]


async def test_capture_tries_again_after_a_while(tmp_path: Path) -> None:
    said = threading.Event()
    path = tmp_path / "captured.db"
    captured = CapturedData(path, retry_s=0.05, on_failure=lambda _: said.set())
    add(captured, 1.0)
    await captured.written()
    await captured.written()  # behind the first look for old rows too, which would fail in the place of a row
    other = sqlite3.connect(path)
    other.execute("ALTER TABLE captured RENAME TO elsewhere")
    add(captured, 2.0)
    await eventually(said.is_set)
    other.execute("ALTER TABLE elsewhere RENAME TO captured")
    other.close()
    await eventually(lambda: captured.add(sample(), ANSWER, model_version=1) is not None)
    counts = await captured.counts()
    assert (counts.rows, counts.dropped >= 1) == (2, True)
    await captured.close()


async def test_capture_goes_on_as_soon_as_rows_that_waited_are_written(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "captured.db"

    def put_the_table_back(reason: str) -> None:
        said.append(reason)
        with closing(sqlite3.connect(path)) as other:
            other.execute("ALTER TABLE elsewhere RENAME TO captured")

    captured = CapturedData(
        path, retry_s=3600, on_failure=put_the_table_back, on_recovery=lambda: said.append("goes on")
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # the writer waits now
        other.execute("ALTER TABLE captured RENAME TO elsewhere")
        for value in range(1000):  # more than one batch: the first is lost, the next ones are written
            add(captured, float(value))
        other.execute("COMMIT")
    await eventually(lambda: said[1:] == ["goes on"])
    assert captured.add(sample(), ANSWER, model_version=1) is not None
    await captured.close()


@pytest.mark.parametrize("limit", [{"max_queued_rows": 100}, {"max_queued_bytes": 20_000}], ids=str)
async def test_a_writer_that_cannot_keep_up_costs_rows_and_no_memory(
    tmp_path: Path, limit: dict[str, int]
) -> None:
    path = tmp_path / "captured.db"
    captured = CapturedData(path, **limit)  # type: ignore[arg-type]  # both are numbers of things
    with sqlite3.connect(path) as other:
        other.execute("BEGIN IMMEDIATE")  # the writer waits now
        taken = [captured.add(sample(), ANSWER, model_version=1) for _ in range(2000)]
    other.close()
    assert taken.count(None) > 1500
    counts = await captured.counts()
    assert counts == CaptureStats(rows=2000 - taken.count(None), labelled=0, dropped=taken.count(None))
    await captured.close()


async def test_adding_never_waits_for_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "captured.db"
    captured = CapturedData(path)
    with sqlite3.connect(path) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        for _ in range(1000):
            captured.add(sample(), ANSWER, model_version=1)
        assert time.monotonic() - began < 1.0
    other.close()
    await captured.close()


async def test_a_closed_store_takes_nothing_and_says_so(tmp_path: Path) -> None:
    captured = CapturedData(tmp_path / "captured.db")
    await captured.close()
    await captured.close()
    assert captured.add(sample(), ANSWER, model_version=1) is None
    with pytest.raises(StoreUnavailable, match="closed"):
        await captured.counts()


async def test_closing_writes_out_what_is_queued(tmp_path: Path) -> None:
    captured = CapturedData(tmp_path / "captured.db")
    for n in range(1000):
        add(captured, n, label=n)
    await captured.close()
    assert await asyncio.to_thread(count_rows, tmp_path / "captured.db") == 1000
    assert await asyncio.to_thread(snapshot_labelled, tmp_path / "captured.db", tmp_path / "d.npz") == 1000


async def test_what_was_committed_survives_kill_9(tmp_path: Path) -> None:
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
    with pytest.raises(LabelConflict):  # the last of them is there, with its label
        await captured.label(last, 1)
    fresh = add(captured, 0.0)
    assert fresh > last + 1_000_000
    await captured.close()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


async def test_another_process_may_take_a_snapshot_while_rows_are_added(
    captured: CapturedData, tmp_path: Path
) -> None:
    add(captured, 1.0, label=1)
    await captured.counts()
    read = [sys.executable, "-c", SNAPSHOT, str(tmp_path / "captured.db"), str(tmp_path / "d.npz")]
    reader = await asyncio.create_subprocess_exec(*read, stdout=subprocess.PIPE)
    add(captured, 2.0, label=2)
    said, _ = await reader.communicate()
    assert int(said) in (1, 2)


SNAPSHOT = """
import sys
from pathlib import Path
from fedbus.stores.captured.reader import snapshot_labelled
print(snapshot_labelled(Path(sys.argv[1]), Path(sys.argv[2])))
"""


async def test_a_database_that_is_none_is_damaged(tmp_path: Path) -> None:
    shutil.copy(sys.executable, tmp_path / "captured.db")
    with pytest.raises(StoreCorrupt, match="is damaged"):
        CapturedData(tmp_path / "captured.db")


async def test_a_place_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="cannot use"):
        CapturedData(Path("/proc/nowhere/captured.db"))
