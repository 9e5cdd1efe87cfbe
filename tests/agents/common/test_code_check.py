"""The check of a task's code, in a real process of its own."""

import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.git_repositories import create_repository
from support.processes import command_of
from support.wheels import build_wheel, restrict_pip_to

from fedbus.agents.common.code_check import CheckFailed, check
from fedbus.agents.common.process_orders import CheckProcessConfig
from fedbus.contracts.code import CodeChecked
from fedbus.contracts.task.task import Task
from fedbus.learning import weights
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import open_code
from fedbus.stores.tasks.task_directory import read_task

TINY = Path(__file__).parents[2] / "support" / "tiny_task"
COMPARED_CODE = {"weight": np.zeros((4, 3), np.float32), "bias": np.zeros(4, np.float32)}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the tiny task that a test can change."""
    return shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("__pycache__"))


def declare(task: Path, check: str, *, check_s: float = 60) -> Task:
    """Return the task with *check* as its own check."""
    (task / "tiny" / "checks.py").write_text(check)
    with (task / "pyproject.toml").open("a") as table:
        table.write(f'\n[tool.fedbus.code]\ncheck = "tiny.checks:check"\ncheck-s = {check_s}\n')
    return read_task(task, open_library)


async def run_check(task: Task, *, server_side: bool = False, like: str = "") -> CodeChecked:
    config = CheckProcessConfig(
        nats_url="", federation="local", task=task, server_side=server_side, like=like
    )
    return await check(config, log_file=Path(task.path).parent / "check.log")


async def check_error(task: Task, *, server_side: bool = False) -> str:
    with pytest.raises(CheckFailed) as failed:
        await run_check(task, server_side=server_side)
    assert "\n" not in str(failed.value)
    return str(failed.value)


async def test_a_check_returns_the_architecture_of_the_model(tiny: Path) -> None:
    assert await run_check(read_task(tiny, open_library), server_side=True) == CodeChecked(
        architecture=weights.architecture_digest(COMPARED_CODE)
    )


async def test_the_first_tensor_that_differs_is_named(tiny: Path) -> None:
    narrow = tiny.parent / "narrow.safetensors"
    weights.save({**COMPARED_CODE, "weight": np.zeros((4, 2), np.float32)}, narrow)
    found = await run_check(read_task(tiny, open_library), like=str(narrow))
    assert found.differs == "'weight' is float32[4, 3] instead of float32[4, 2]"


async def test_code_that_cannot_be_imported_is_rejected_with_the_reason(tiny: Path) -> None:
    (tiny / "tiny" / "client_app.py").write_text("import no_such_library\napp = None")
    assert "imports 'no_such_library', which is not installed" in await check_error(
        read_task(tiny, open_library)
    )


async def test_only_the_server_checks_the_server_app(tiny: Path) -> None:
    (tiny / "tiny" / "server_app.py").write_text("import no_such_library\napp = None")
    task = read_task(tiny, open_library)
    assert (await run_check(task)).architecture
    assert "no_such_library" in await check_error(task, server_side=True)


async def test_a_model_that_cannot_be_built_is_rejected_with_the_reason(tiny: Path) -> None:
    (tiny / "tiny" / "model.py").write_text("class Net:\n    def __init__(self): self.depth = 1 / 0\n")
    assert "tiny.model:Net did not build a model: ZeroDivisionError" in await check_error(
        read_task(tiny, open_library)
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("assert False, 'accuracy fell'", "tiny.checks:check failed: AssertionError: accuracy fell"),
        pytest.param("import sys; sys.exit(0)", "failed: SystemExit: 0", marks=pytest.mark.slow),
        ("import os; os._exit(0)", "the check ended its process without a result"),
        pytest.param("import os; os._exit(7)", "ended with code 7", marks=pytest.mark.slow),
        ("import os; os.kill(os.getpid(), 9)", "was killed (SIGKILL"),
    ],
)
async def test_a_failed_check_rejects_the_code(tiny: Path, body: str, reason: str) -> None:
    # the log already has the output of a successful check, which must not be taken for the result of the next one
    assert (await run_check(read_task(tiny, open_library))).architecture
    assert reason in await check_error(declare(tiny, f"def check():\n    {body}\n"))


async def test_the_output_of_a_check_is_ignored(tiny: Path) -> None:
    task = declare(
        tiny, "import sys\ndef check():\n    print('{}', end='')\n    print('no', file=sys.stderr, end='')\n"
    )
    assert (await run_check(task)).architecture == weights.architecture_digest(COMPARED_CODE)


async def test_a_check_that_does_not_end_is_killed(tiny: Path) -> None:
    task = declare(tiny, "import time\ndef check(): time.sleep(600)\n", check_s=2)
    assert await check_error(task) == "the check did not end in time (limit code.check-s = 2 s)"
    own = [command_of(child) for child in psutil.Process().children(recursive=True)]
    assert not [command for command in own if "check" in command]


async def test_a_check_imports_the_installed_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restrict_pip_to(tmp_path / "index", monkeypatch)
    build_wheel(tmp_path / "index", "moonlib", "1.0", "phase = 'full'\n")
    repository = create_repository(tmp_path / "origin")
    module = (repository.path / "moons_app" / "task.py").read_text()
    table = (repository.path / "pyproject.toml").read_text()
    declared = '\n[tool.fedbus.code]\ninstall = ["moonlib"]\n'
    repository.commit({"moons_app/task.py": f"import moonlib\n{module}", "pyproject.toml": table + declared})
    code = open_code(repository.url, tmp_path / "home", open_library, allow_install=["moonlib"])
    assert (await run_check(await code.load_task(repository.head))).architecture
