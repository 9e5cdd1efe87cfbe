"""The parts of the engine `ray` that need no cluster."""

from pathlib import Path

import numpy as np
import pytest

from fedbus.learning.installed_libraries import open_library
from fedbus.simulation.engine import EngineFailed
from fedbus.simulation.ray import task_archive
from fedbus.simulation.ray.engine import describe_end
from fedbus.simulation.ray.task_archive import TaskCopy, pack_task
from fedbus.simulation.ray.worker_actor import JOIN_BYTES, pack_buffers, unpack_buffers
from fedbus.stores.tasks.task_directory import create_task, read_task


def test_a_task_that_a_machine_lacks_is_copied(tmp_path: Path) -> None:
    create_task(tmp_path / "task", "digits", library="functions")
    (tmp_path / "task/.venv").mkdir()
    (tmp_path / "task/.venv/large").write_text("not sent")
    task = read_task(tmp_path / "task", open_library)
    archive = pack_task(task)
    assert TaskCopy(task, archive).task is task
    files = {file.relative_to(task.path): file.read_bytes() for file in Path(task.path).rglob("*.py")}
    (tmp_path / "task").rename(tmp_path / "elsewhere")
    copy = TaskCopy(task, archive)
    here = Path(copy.task.path)
    assert {file.relative_to(here): file.read_bytes() for file in here.rglob("*.py")} == files
    assert not (here / ".venv").exists()
    copy.remove()
    assert not here.exists()


def test_a_task_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_task(tmp_path / "task", "digits", library="functions")
    monkeypatch.setattr(task_archive, "MAX_ARCHIVE_BYTES", 100)
    with pytest.raises(EngineFailed, match=r"has 0 MiB \(limit 0 MiB\).* Move its data to the data folder"):
        pack_task(read_task(tmp_path / "task", open_library))


@pytest.mark.parametrize("size", [0, 5, JOIN_BYTES])
def test_buffers_keep_their_bytes(size: int) -> None:
    content = np.random.default_rng(0).integers(0, 256, (2, size), np.uint8)
    packed = pack_buffers([memoryview(content[0]), memoryview(content[1])])
    assert b"".join(unpack_buffers(packed)) == content.tobytes()
    if size == JOIN_BYTES:
        assert all(np.shares_memory(one, content) for one in packed), "large buffers are not copied"
    assert pack_buffers([]) == []


@pytest.mark.parametrize(
    ("text", "is_killed", "description"),
    [
        ("The actor died because its node has died. Node Id: 1", False, "its machine left the cluster"),
        ("Task was killed due to the node running low on memory. OOM", False, "had no memory left"),
        ("any", True, "did not answer in time"),
        ("Socket\n closed", False, "has ended: Socket closed"),
    ],
)
def test_the_end_of_a_worker_is_described(text: str, description: str, *, is_killed: bool) -> None:
    assert description in describe_end(RuntimeError(text), is_killed=is_killed)
