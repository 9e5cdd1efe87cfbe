"""A command that needs an extra which is not installed: one line that names it."""

import subprocess
from pathlib import Path

import pytest
from simulation.tiny_tasks import write_task
from support.blocked_packages import environment_without


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [("--engine=ray", "ray", "ray"), ("--fleet", "async_solipsism", "simulation")],
)
def test_a_simulation_names_the_extra_that_it_needs(
    tmp_path: Path, option: str, package: str, extra: str
) -> None:
    task = write_task(tmp_path / "task", "functions")
    result = subprocess.run(
        ["fedbus", "simulate", str(task.path), option],
        env=environment_without(tmp_path, package),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert f"pip install 'fedbus[{extra}]'" in result.stderr
    assert package in result.stderr
    assert "Traceback" not in result.stderr
