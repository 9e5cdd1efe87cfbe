"""Read Git objects and check each against its object id.

Git trusts the content of its object store. Here, a verified commit also verifies every tree and file below it:
reading an object whose content does not match its id raises ObjectCorrupt.
"""

import hashlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final

from fedbus.stores.code.subprocesses import SubprocessFailed, SubprocessRunner
from fedbus.stores.tasks import git_version

MAX_TREE_BYTES: Final = 16 * 1024**2
MAX_COMMIT_BYTES: Final = 1024**2
_PIECE_BYTES: Final = 1024**2
_SIGNATURE: Final = re.compile(rb"^gpgsig (-----BEGIN [A-Z ]+-----)", re.MULTILINE)
_COMMITTED_AT: Final = re.compile(rb"^committer .*> (\d+) [+-]\d{4}$", re.MULTILINE)


class ObjectCorrupt(Exception):
    """An object does not exist, or does not match its id."""


class ObjectTooLarge(Exception):
    """An object exceeds the size limit."""


@dataclass(frozen=True)
class CommitObject:
    """The header fields of a commit."""

    tree: str
    parents: tuple[str, ...]
    committed_at: datetime
    """Time of the commit, as set by the committer."""
    signature: str
    """The first line of the signature; empty if there is none."""


@dataclass(frozen=True)
class TreeEntry:
    mode: str
    name: bytes
    id: str


class GitObjects:
    """The objects of one repository, read by a ``git cat-file --batch`` process."""

    def __init__(self, program: "subprocess.Popen[bytes]") -> None:
        assert program.stdin is not None
        assert program.stdout is not None
        self._stdin: IO[bytes] = program.stdin
        self._stdout: IO[bytes] = program.stdout

    def read_commit(self, id: str) -> CommitObject:
        header, _, _ = self._read(id, b"commit", MAX_COMMIT_BYTES).partition(b"\n\n")
        names = [
            line.split(b" ", 1) for line in header.split(b"\n") if line.startswith((b"tree ", b"parent "))
        ]
        signature, when = _SIGNATURE.search(header), _COMMITTED_AT.search(header)
        if not names or names[0][0] != b"tree" or when is None:
            raise ObjectCorrupt(f"{id} is not a valid commit")
        return CommitObject(
            tree=names[0][1].decode(),
            parents=tuple(name.decode() for _, name in names[1:]),
            committed_at=datetime.fromtimestamp(int(when[1]), UTC),
            signature=signature[1].decode() if signature else "",
        )

    def read_tree(self, id: str) -> list[TreeEntry]:
        """Return the entries of one directory."""
        listing, entries = self._read(id, b"tree", MAX_TREE_BYTES), []
        while listing:
            head, nul, rest = listing.partition(b"\0")
            mode, space, name = head.partition(b" ")
            if not (nul and space and len(rest) >= 20):
                raise ObjectCorrupt(f"{id} is not a valid tree")
            entries.append(TreeEntry(mode.decode(), name, rest[:20].hex()))
            listing = rest[20:]
        return entries

    def read_blob(self, id: str, max_bytes: int) -> bytes:
        return self._read(id, b"blob", max_bytes)

    def copy_blob(self, id: str, target: IO[bytes], max_bytes: int) -> int:
        """Copy the file *id* to *target*, and return its size in bytes."""
        size = self._read_header(id, b"blob", max_bytes)
        digest, remaining = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), size
        while remaining:
            piece = self._stdout.read(min(remaining, _PIECE_BYTES))
            if not piece:
                raise ObjectCorrupt(f"{id} ends too early")
            digest.update(piece)
            target.write(piece)
            remaining -= len(piece)
        self._check_end(id, digest.hexdigest())
        return size

    def _read(self, id: str, kind: bytes, max_bytes: int) -> bytes:
        size = self._read_header(id, kind, max_bytes)
        content = self._stdout.read(size)
        self._check_end(
            id, hashlib.sha1(b"%s %d\0" % (kind, size) + content, usedforsecurity=False).hexdigest()
        )
        return content

    def _read_header(self, id: str, kind: bytes, max_bytes: int) -> int:
        try:
            self._stdin.write(f"{id}\n".encode())
            self._stdin.flush()
        except OSError:
            raise ObjectCorrupt(f"{id} cannot be read") from None
        match self._stdout.readline().split():
            case [name, actual_kind, size] if name.decode() == id and actual_kind == kind:
                if int(size) > max_bytes:
                    raise ObjectTooLarge(f"{int(size)} bytes (limit {max_bytes})")
                return int(size)
            case _:
                raise ObjectCorrupt(f"{id} does not exist, or is not a {kind.decode()}")

    def _check_end(self, id: str, digest: str) -> None:
        if self._stdout.read(1) != b"\n" or digest != id:
            raise ObjectCorrupt(f"{id} does not match its content")


@contextmanager
def open_objects(directory: Path, programs: SubprocessRunner) -> Iterator[GitObjects]:
    """Open the objects of the repository in *directory*. Raises ObjectCorrupt if it cannot be read."""
    command = git_version.build_command(directory, "cat-file", "--batch")
    try:
        with programs.start(
            command, environment=git_version.build_environment(), stdin=subprocess.PIPE
        ) as program:
            yield GitObjects(program)
    except SubprocessFailed as error:
        raise ObjectCorrupt(str(error)) from None
