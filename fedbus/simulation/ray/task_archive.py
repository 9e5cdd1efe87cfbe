"""The files of a task on their way to machines that do not have them."""

import io
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from fedbus.contracts.task.task import Task
from fedbus.simulation.engine import EngineFailed
from fedbus.stores.tasks.task_directory import list_source_files

MAX_ARCHIVE_BYTES: Final = 100 * 1024**2


def pack_task(task: Task) -> bytes:
    """Return a ZIP archive of the task's directory, without hidden files, caches and build outputs.

    Raises:
        EngineFailed: the directory is too large.

    """
    directory = Path(task.path)
    files = [directory / name for name in list_source_files(directory)]
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size > MAX_ARCHIVE_BYTES:
        raise EngineFailed(
            f"the task's directory {directory} has {size / 1024**2:,.0f} MiB (limit {MAX_ARCHIVE_BYTES / 1024**2:,.0f} "
            "MiB), which is too much to send to the machines of a Ray cluster. Move its data to the data folder"
        )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in files:
            if file.is_file():
                archive.write(file, file.relative_to(directory).as_posix())
    return content.getvalue()


class TaskCopy:
    """The task on this machine: its own directory if it exists here, else a temporary copy from *archive*."""

    def __init__(self, task: Task, archive: bytes) -> None:
        self._copy: Path | None = None
        if not Path(task.path).is_dir():
            self._copy = Path(tempfile.mkdtemp(prefix="fedbus-task-"))
            with zipfile.ZipFile(io.BytesIO(archive)) as files:
                files.extractall(self._copy)
            task = task.model_copy(update={"path": str(self._copy)})
        self.task = task

    def remove(self) -> None:
        """Remove the copy."""
        if self._copy is not None:
            shutil.rmtree(self._copy, ignore_errors=True)
