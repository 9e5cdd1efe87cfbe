"""The identity of files, as keys of the cache."""

from pathlib import Path


def file_identity(*files: Path) -> list[tuple[str, int, int]]:
    """Return path, size and time of modification of each file: they change when the file is replaced."""
    statuses = ((file, file.stat()) for file in files)
    return [(str(file.resolve()), status.st_size, status.st_mtime_ns) for file, status in statuses]
