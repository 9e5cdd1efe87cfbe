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
    """All files in *subdirectory* of *tree*. Raises InvalidTree."""
    for part in [part for part in subdirectory.split("/") if part]:
        below = [
            one for one in objects.tree(tree) if one.name == os.fsencode(part) and one.mode == _DIRECTORY_MODE
        ]
        if not below:
            raise InvalidTree(f"it has no directory {subdirectory}; correct #subdirectory=")
        tree = below[0].id
    found = []
    for entry in _walk_tree(objects, tree, "", 0):
        found.append(entry)
        if len(found) > MAX_SOURCE_FILES:
            raise InvalidTree(
                f"it has too many files (limit {MAX_SOURCE_FILES}); name the directory of the task with #subdirectory=…"
            )
    return found


def _walk_tree(objects: GitObjects, tree: str, prefix: str, depth: int) -> Iterator[CheckoutEntry]:
    if depth > _MAX_DEPTH:
        raise InvalidTree(f"{prefix} is nested too deeply (limit {_MAX_DEPTH} directories)")
    for entry in objects.tree(tree):
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
    left = MAX_BYTES
    try:
        for entry in (one for one in entries if not one.is_link):
            left -= _write_file(objects, entry, directory, left)
        for entry in (
            one for one in entries if one.is_link
        ):  # last, so that no file is written through a link
            _write_link(objects, entry, directory)
    except FileExistsError as error:
        raise InvalidTree(f"{error.filename} occurs twice") from None
    except ObjectTooLarge as error:
        raise InvalidTree(f"it is too large: {error}") from None
    _check_links(entries, directory)
    for one, _, _ in os.walk(directory, topdown=False):
        Path(one).chmod(0o555)


def _write_file(objects: GitObjects, entry: CheckoutEntry, directory: Path, at_most: int) -> int:
    path = directory / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        size = objects.copy(entry.id, file, at_most)
        os.fchmod(file.fileno(), _FILE_MODES[entry.mode])
    return size


def _write_link(objects: GitObjects, entry: CheckoutEntry, directory: Path) -> None:
    path = directory / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.fsdecode(objects.blob(entry.id, _MAX_LINK_BYTES)))


def _check_links(entries: Sequence[CheckoutEntry], directory: Path) -> None:
    inside = directory.resolve()
    for entry in (one for one in entries if one.is_link):
        link = directory / entry.path
        try:
            stays = not link.readlink().is_absolute() and link.resolve().is_relative_to(inside)
        except (OSError, RuntimeError, ValueError):
            stays = False
        if not stays:
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
    for one, below, files in os.walk(directory):
        links = [name for name in below if (Path(one) / name).is_symlink()]
        for path in (Path(one) / name for name in [*files, *links]):
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
    for one, _, _ in os.walk(directory):
        with suppress(OSError):
            Path(one).chmod(stat.S_IRWXU)
    shutil.rmtree(directory, ignore_errors=True)
