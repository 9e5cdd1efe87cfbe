"""The files of a commit, as a directory.

Git's own checkout would run what a repository asks for: filters, hooks, large-file downloads. Here
files are written as they are, for reading only, and what could lead elsewhere is refused: a link
that leaves the directory, another repository inside this one, a name that is no name.
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
"""All files of a task together: data and weights have places of their own."""
_MAX_LINK_BYTES: Final = 4096
_MAX_DEPTH: Final = 64

_DIRECTORY_MODE, _LINK_MODE, _SUBMODULE_MODE = "40000", "120000", "160000"
_FILE_MODES: Final = {"100644": 0o444, "100664": 0o444, "100755": 0o555}
_BYTECODE: Final = "__pycache__"


class InvalidTree(Exception):
    """The files of a commit cannot be used; the text says which and why."""


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
    """All files in *subdirectory* of *tree*; raises BadTree."""
    for part in [part for part in subdirectory.split("/") if part]:
        below = [
            one for one in objects.tree(tree) if one.name == os.fsencode(part) and one.mode == _DIRECTORY_MODE
        ]
        if not below:
            raise InvalidTree(f"it has no directory {subdirectory}: correct #subdirectory=")
        tree = below[0].id
    found = []
    for entry in _walk_tree(objects, tree, "", 0):
        found.append(entry)
        if len(found) > MAX_SOURCE_FILES:
            raise InvalidTree(
                f"it has more than {MAX_SOURCE_FILES} files: name the task's own, #subdirectory=…"
            )
    return found


def _walk_tree(objects: GitObjects, tree: str, prefix: str, depth: int) -> Iterator[CheckoutEntry]:
    if depth > _MAX_DEPTH:
        raise InvalidTree(f"{prefix} is deeper than {_MAX_DEPTH} directories")
    for entry in objects.tree(tree):
        path = prefix + _check_name(entry, prefix)
        if entry.mode == _DIRECTORY_MODE:
            yield from _walk_tree(objects, entry.id, f"{path}/", depth + 1)
        elif entry.mode == _LINK_MODE or entry.mode in _FILE_MODES:
            yield CheckoutEntry(path, entry.mode, entry.id)
        elif entry.mode == _SUBMODULE_MODE:
            raise InvalidTree(
                f"{path} is a submodule, whose files no signature of this commit is for: copy them in"
            )
        else:
            raise InvalidTree(f"{path} is of a kind ({entry.mode}) that no task needs")


def _check_name(entry: TreeEntry, prefix: str) -> str:
    try:
        name = entry.name.decode()
    except UnicodeDecodeError:
        raise InvalidTree(f"{prefix}{entry.name!r} is no name in UTF-8") from None
    if name in {"", ".", ".."} or "/" in name or "\\" in name or name.lower() == ".git":
        raise InvalidTree(f"{prefix}{name!r} is no name that a file may have here")
    return name


# --- written ---------------------------------------------------------------------------------


def write(objects: GitObjects, entries: Sequence[CheckoutEntry], directory: Path) -> None:
    """Make *directory* with exactly *entries*, for reading only; raises BadTree."""
    directory.mkdir()
    left = MAX_BYTES
    try:
        for entry in (one for one in entries if not one.is_link):
            left -= _write_file(objects, entry, directory, left)
        for entry in (one for one in entries if one.is_link):  # last, so that nothing is written through one
            _write_link(objects, entry, directory)
    except FileExistsError as error:
        raise InvalidTree(f"{error.filename} is in it twice") from None
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
            raise InvalidTree(f"{entry.path} is a link that leads out of the task: copy the file in")


# --- compared -----------------------------------------------------------------------------------


def describe_difference(entries: Sequence[CheckoutEntry], directory: Path) -> str | None:
    """Where *directory* departs from *entries*, in words; None where it is exactly them.

    Bytecode that Python has left is removed: it would be run in the place of the source that was verified.
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
    """Remove *directory*, whatever of it may only be read; it is gone from its place at once, or not there."""
    out_of_the_way = directory.with_name(f".gone-{directory.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        directory.rename(out_of_the_way)
    except FileNotFoundError:
        return
    sweep(out_of_the_way)


def sweep(directory: Path) -> None:
    """Remove what is left of a directory."""
    for one, _, _ in os.walk(directory):
        with suppress(OSError):
            Path(one).chmod(stat.S_IRWXU)
    shutil.rmtree(directory, ignore_errors=True)
