"""Payloads in memory that workers map."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbus.simulation.engine import EngineFailed
from fedbus.simulation.local import shared_memory
from fedbus.simulation.local.shared_memory import map_shared, write_shared


def test_a_payload_is_read_only_where_it_is_mapped() -> None:
    view = map_shared(write_shared([memoryview(b"abc"), memoryview(b"def")]))
    assert bytes(view) == b"abcdef"
    with pytest.raises(TypeError):
        view[0] = 0


def test_without_memory_a_payload_is_in_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_memory, "_create_in_memory", _fail_with(errno.ENOSPC))
    assert bytes(map_shared(write_shared([memoryview(b"abc")]))) == b"abc"
    assert list(tmp_path.iterdir()) == []


def test_without_any_space_the_error_has_the_size_and_the_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_memory, "_create_in_memory", _fail_with(errno.ENOMEM))
    monkeypatch.setattr(os, "posix_fallocate", _fail_with(errno.ENOSPC))
    with pytest.raises(EngineFailed, match=r"3\.0 MiB.*No space left.*TMPDIR"):
        write_shared([memoryview(bytes(3 * 1024**2))])


def _fail_with(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail
