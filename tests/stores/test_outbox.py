"""The outbox: ordered, and durable beyond the process."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbus.stores.errors import StoreCorrupt, StoreUnavailable
from fedbus.stores.outbox import OutboxFull, SqliteOutbox

APPENDS_FOREVER = """
import sys
from pathlib import Path
from fedbus.stores.outbox import SqliteOutbox
outbox = SqliteOutbox(Path(sys.argv[1]))
while True:
    print(outbox.append("fedbus.f.life.client.c1", {}, b"x" * 200), flush=True)
"""


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[SqliteOutbox]:
    with SqliteOutbox(tmp_path / "outbox.db") as outbox:
        yield outbox


def drain(outbox: SqliteOutbox) -> Iterator[bytes]:
    while entry := outbox.first():
        yield entry.body
        outbox.remove(entry.number)


def test_messages_are_returned_in_order(outbox: SqliteOutbox) -> None:
    for number in range(20):
        outbox.append("a.b", {"ce-id": str(number)}, b"%d" % number)
    assert list(drain(outbox)) == [b"%d" % number for number in range(20)]
    assert outbox.first() is None


def test_a_message_is_returned_unchanged(outbox: SqliteOutbox) -> None:
    number = outbox.append("fedbus.f.life.x", {"traceparent": "00-…", "ce-id": "1"}, b"\x00\xff")
    entry = outbox.first()
    assert entry is not None
    assert (entry.number, entry.subject, entry.body) == (number, "fedbus.f.life.x", b"\x00\xff")
    assert entry.headers == {"traceparent": "00-…", "ce-id": "1"}


def test_the_last_message_of_a_subject_can_be_read(outbox: SqliteOutbox) -> None:
    for subject, body in (("a", b"1"), ("a", b"2"), ("b", b"3")):
        outbox.append(subject, {}, body)
    last = outbox.last("a")
    assert last is not None
    assert last.body == b"2"
    assert outbox.last("c") is None


def test_a_number_is_never_reused(outbox: SqliteOutbox) -> None:
    first = outbox.append("a", {}, b"")
    outbox.remove(first)
    assert outbox.append("a", {}, b"") > first


def test_removing_twice_counts_once(outbox: SqliteOutbox) -> None:
    first = outbox.append("a", {}, b"")
    outbox.append("a", {}, b"")
    outbox.remove(first)
    outbox.remove(first)
    assert len(outbox) == 1


def test_messages_survive_a_reopen(tmp_path: Path) -> None:
    with SqliteOutbox(tmp_path / "outbox.db") as first:
        first.append("a", {}, b"1")
    with SqliteOutbox(tmp_path / "outbox.db") as second:
        assert len(second) == 1
        assert list(drain(second)) == [b"1"]


def test_a_full_outbox_rejects_messages_and_keeps_its_own(tmp_path: Path) -> None:
    with SqliteOutbox(tmp_path / "outbox.db", max_entries=2) as outbox:
        outbox.append("a", {}, b"1")
        outbox.append("a", {}, b"2")
        with pytest.raises(OutboxFull, match="is full with 2 messages"):
            outbox.append("a", {}, b"3")
        assert list(drain(outbox)) == [b"1", b"2"]


def test_appended_messages_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    with subprocess.Popen(
        [sys.executable, "-c", APPENDS_FOREVER, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        returned = [int(writer.stdout.readline()) for _ in range(200)]
        writer.send_signal(signal.SIGKILL)
        returned += [int(line) for line in writer.stdout.read().split("\n")[:-1] if line]
    with SqliteOutbox(path) as outbox:
        assert len(outbox) >= len(returned)
        numbers = []
        while entry := outbox.first():
            numbers.append(entry.number)
            outbox.remove(entry.number)
    assert numbers[: len(returned)] == returned


def test_a_file_that_is_not_a_database_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    path.write_bytes(b"this is not a database " * 100)
    with pytest.raises(StoreCorrupt, match="is corrupt"):
        SqliteOutbox(path)


def test_a_path_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot use"):
        SqliteOutbox(tmp_path / "file" / "outbox.db")


def test_another_connection_can_read_an_open_outbox(outbox: SqliteOutbox, tmp_path: Path) -> None:
    outbox.append("a", {}, b"")
    other = sqlite3.connect(tmp_path / "outbox.db")
    assert other.execute("SELECT count(*) FROM outbox").fetchone() == (1,)
    other.close()
