"""Write the files of a commit to a directory.

``git checkout`` runs what a repository configures: filters, hooks, large-file downloads. Here files are written
unchanged and read-only. Entries that lead out of the directory are rejected: links to the outside, submodules,
invalid names.
"""

import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.stores.code.git_objects import GitObjects, ObjectTooLarge, TreeEntry
from fedbus.stores.tasks import git_version
from fedbus.stores.tasks.task_directory import MAX_SOURCE_FILES

MAX_BYTES: Final = 512 * 1024**2
"""Limit for all files of a task together; data and weights do not belong in the repository."""
_MAX_LINK_BYTES: Final = 4096
_MAX_DEPTH: Final = 64

_DIRECTORY_MODE, _LINK_MODE, _SUBMODULE_MODE = "40000", "120000", "160000"
_FILE_MODES: Final = {"100644": 0o444, "100664": 0o444, "100755": 0o555}
_BYTECODE: Final = "__pycache__"


class InvalidTree(Exception):
    """A file of the commit is not allowed."""


@dataclass(frozen=True)
class CheckoutEntry:
    """A file or link of a commit."""

    path: str
    mode: str
    id: str

    @property
    def is_link(self) -> bool:
        return self.mode == _LINK_MODE


def list_tree_files(objects: GitObjects, tree: str, subdirectory: str) -> list[CheckoutEntry]:
    """Return all files in *subdirectory* of *tree*. Raises InvalidTree."""
    for part in [part for part in subdirectory.split("/") if part]:
        directories = [
            entry
            for entry in objects.read_tree(tree)
            if entry.name == os.fsencode(part) and entry.mode == _DIRECTORY_MODE
        ]
        if not directories:
            raise InvalidTree(f"it has no directory {subdirectory}; correct #subdirectory=")
        tree = directories[0].id
    files = []
    for entry in _walk_tree(objects, tree, "", 0):
        files.append(entry)
        if len(files) > MAX_SOURCE_FILES:
            raise InvalidTree(
                f"it has too many files (limit {MAX_SOURCE_FILES}); name the directory of the task with #subdirectory=…"
            )
    return files


def _walk_tree(objects: GitObjects, tree: str, prefix: str, depth: int) -> Iterator[CheckoutEntry]:
    if depth > _MAX_DEPTH:
        raise InvalidTree(f"{prefix} is nested too deeply (limit {_MAX_DEPTH} directories)")
    for entry in objects.read_tree(tree):
        path = prefix + _check_name(entry, prefix)
        if entry.mode == _DIRECTORY_MODE:
            yield from _walk_tree(objects, entry.id, f"{path}/", depth + 1)
        elif entry.mode == _LINK_MODE or entry.mode in _FILE_MODES:
            yield CheckoutEntry(path, entry.mode, entry.id)
        elif entry.mode == _SUBMODULE_MODE:
            raise InvalidTree(
                f"{path} is a submodule; the signature of the commit does not cover its files; copy them in"
            )
        else:
            raise InvalidTree(f"{path} has the mode {entry.mode}, which is not allowed")


def _check_name(entry: TreeEntry, prefix: str) -> str:
    try:
        name = entry.name.decode()
    except UnicodeDecodeError:
        raise InvalidTree(f"the name {prefix}{entry.name!r} is not UTF-8") from None
    if name in {"", ".", ".."} or "/" in name or "\\" in name or name.lower() == ".git":
        raise InvalidTree(f"the file name {prefix}{name!r} is not allowed")
    return name


# --- write ---


def write(objects: GitObjects, entries: Sequence[CheckoutEntry], directory: Path) -> None:
    """Create *directory* with exactly *entries*, read-only. Raises InvalidTree."""
    directory.mkdir()
    remaining_bytes = MAX_BYTES
    try:
        for entry in entries:
            if not entry.is_link:
                remaining_bytes -= _write_file(objects, entry, directory, remaining_bytes)
        for entry in entries:
            if entry.is_link:  # last, so that no file is written through a link
                _write_link(objects, entry, directory)
    except FileExistsError as error:
        raise InvalidTree(f"{error.filename} occurs twice") from None
    except ObjectTooLarge as error:
        raise InvalidTree(f"it is too large: {error}") from None
    _check_links(entries, directory)
    for folder, _, _ in os.walk(directory, topdown=False):
        Path(folder).chmod(0o555)


def _write_file(objects: GitObjects, entry: CheckoutEntry, directory: Path, max_bytes: int) -> int:
    path = directory / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        size = objects.copy_blob(entry.id, file, max_bytes)
        os.fchmod(file.fileno(), _FILE_MODES[entry.mode])
    return size


def _write_link(objects: GitObjects, entry: CheckoutEntry, directory: Path) -> None:
    path = directory / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.fsdecode(objects.read_blob(entry.id, _MAX_LINK_BYTES)))


def _check_links(entries: Sequence[CheckoutEntry], directory: Path) -> None:
    root = directory.resolve()
    for entry in (entry for entry in entries if entry.is_link):
        link = directory / entry.path
        try:
            is_inside = not link.readlink().is_absolute() and link.resolve().is_relative_to(root)
        except (OSError, RuntimeError, ValueError):
            is_inside = False
        if not is_inside:
            raise InvalidTree(f"{entry.path} is a link out of the task; copy the file in")


# --- compare ---


def describe_difference(entries: Sequence[CheckoutEntry], directory: Path) -> str | None:
    """Describe the first difference between *directory* and *entries*; None if there is none.

    Bytecode files are removed first: Python would run them instead of the verified source.
    """
    present = set(_list_present(directory, {entry.path for entry in entries}))
    for entry in entries:
        path = directory / entry.path
        if entry.path not in present:
            return f"{entry.path} is missing"
        if (
            path.is_symlink() != entry.is_link
            or git_version.compute_object_id(path, like=entry.id) != entry.id
        ):
            return f"{entry.path} was changed"
    extra = sorted(present - {entry.path for entry in entries})
    return f"{extra[0]} was added" if extra else None


def _list_present(directory: Path, committed: set[str]) -> Iterator[str]:
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for path in (Path(folder) / name for name in [*files, *links]):
            name = path.relative_to(directory).as_posix()
            if path.parent.name == _BYTECODE and name not in committed:
                path.unlink()
            else:
                yield name


def remove(directory: Path) -> None:
    """Remove *directory* with its read-only content. It is renamed first, so that it disappears at once."""
    renamed = directory.with_name(f".gone-{directory.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        directory.rename(renamed)
    except FileNotFoundError:
        return
    sweep(renamed)


def sweep(directory: Path) -> None:
    """Remove a directory with read-only content, as far as possible."""
    for folder, _, _ in os.walk(directory):
        with suppress(OSError):
            Path(folder).chmod(stat.S_IRWXU)
    shutil.rmtree(directory, ignore_errors=True)
