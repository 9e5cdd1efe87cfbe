"""Atomic file writes: old content or new content, and nothing left behind."""

import os
import threading
from pathlib import Path

import pytest

from fedbus.common.filesystem import SHARED_MODE, atomic_open, atomic_write, publish_file, temporary_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("content", ["größer", "größer".encode(), ""])
@pytest.mark.parametrize("durable", [True, False])
def test_content_replaces_what_was_there(tmp_path: Path, content: str | bytes, durable: bool) -> None:
    (tmp_path / "file").write_text("old and longer")
    atomic_write(tmp_path / "file", content, durable=durable)
    expected = content.encode() if isinstance(content, str) else content
    assert (tmp_path / "file").read_bytes() == expected
    assert names(tmp_path) == ["file"]


def test_an_error_keeps_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def write_half() -> None:
        with atomic_open(tmp_path / "file") as file:
            file.write(b"half")
            file.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_reader_sees_the_old_content_until_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with atomic_open(tmp_path / "file") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_the_mode_is_exact_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "private", "")
        atomic_write(tmp_path / "shared", "", mode=SHARED_MODE)
    finally:
        os.umask(before)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o644


def test_without_overwrite_an_existing_file_stays(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "first", overwrite=False)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "file", "second", overwrite=False)
    assert (tmp_path / "file").read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_without_overwrite_exactly_one_writer_succeeds(tmp_path: Path) -> None:
    barrier, successes = threading.Barrier(8), []

    def write(number: int) -> None:
        barrier.wait()
        try:
            atomic_write(tmp_path / "file", str(number), overwrite=False)
        except FileExistsError:
            return
        successes.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(tmp_path / "file").read_text()] == [str(number) for number in successes]


def test_a_temporary_file_is_removed_unless_published(tmp_path: Path) -> None:
    with temporary_file(tmp_path / "file") as part:
        part.write_text("written by a library")
    assert names(tmp_path) == []
    with temporary_file(tmp_path / "file") as part:
        part.write_text("written by a library")
        publish_file(part, tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_a_directory_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "missing" / "file", "")
