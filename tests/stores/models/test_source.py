"""Sources of artifacts: files, bytes and buffers are read in order, in pieces of the given size."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.stores.models.source import Source, iter_parts, iter_pieces, source_size_bytes


@pytest.mark.parametrize("kind", ["file", "bytes", "buffers"])
def test_every_source_is_read_in_order_in_equal_parts(tmp_path: Path, kind: str) -> None:
    content, file = bytes(range(100)), tmp_path / "content"
    file.write_bytes(content)
    kinds: dict[str, Source] = {
        "file": file,
        "bytes": content,
        "buffers": [content[:7], b"", memoryview(content)[7:80], bytearray(content[80:])],
    }
    source = kinds[kind]
    assert source_size_bytes(source) == 100
    assert [len(part) for part in iter_parts(source, 30)] == [30, 30, 30, 10]
    assert b"".join(iter_parts(source, 30)) == content
    assert b"".join(iter_pieces(source, 30)) == content
    assert max(len(piece) for piece in iter_pieces(source, 30)) <= 30


@given(st.lists(st.binary(max_size=40)), st.integers(1, 50))
def test_parts_of_buffers_equal_parts_of_the_joined_bytes(buffers: list[bytes], part_bytes: int) -> None:
    assert list(iter_parts(buffers, part_bytes)) == list(iter_parts(b"".join(buffers), part_bytes))
