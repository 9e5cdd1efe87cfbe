"""The commands, tables and links of the README and the docs exist."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedbus.app.cli.main import app
from fedbus.contracts.task.task import TaskTable

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.removeprefix("$ fedbus ") for line in README.splitlines() if line.startswith("$ fedbus ")]
MAKE = re.findall(r"^\$ make (\w+)", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_readme_exists_with_its_options(command: str) -> None:
    words = command.partition("#")[0].split()
    options = [word for word in words if word.startswith("--")]
    names = [word for word in words[:2] if not word.startswith("--") and "/" not in word]
    for depth in (names, names[:1]):
        result = CliRunner().invoke(app, [*depth, "--help"], env={"COLUMNS": "200"})
        if result.exit_code == 0:
            break
    assert result.exit_code == 0, result.output
    assert all(option in result.output for option in options), result.output


@pytest.mark.parametrize("target", MAKE)
def test_each_make_target_of_the_readme_exists(target: str) -> None:
    subprocess.run(
        ["make", "--dry-run", target, f"PYTHON={sys.executable}"], cwd=ROOT, check=True, capture_output=True
    )


def test_the_task_table_of_the_readme_is_valid() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    table = tomllib.loads(block)["tool"]["fedbus"]
    assert TaskTable.model_validate(table).task == "digits"


def test_every_link_of_the_readme_and_the_docs_has_a_target() -> None:
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
