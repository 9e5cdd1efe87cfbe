"""The page and `fedbus task validate --keys` have every key of a task."""

from pathlib import Path

import pytest
from support.cli import FedbusCli
from support.federation import tiny_task

from fedbus.app.docs_generator.task_keys_page import ROOT, table_keys, task_keys_page, task_tables
from fedbus.contracts.task.base import ConfigSection
from fedbus.contracts.task.task import TaskTable

GUIDE = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text()


def test_the_page_has_every_table_of_a_task() -> None:
    tables = {one for one in ConfigSection.__subclasses__() if one.__module__.startswith("fedbus.contracts.")}
    assert set(task_tables().values()) == {TaskTable, *tables}
    assert all(f"## `[{name}]`" in task_keys_page() for name in task_tables())


@pytest.mark.parametrize("name", task_tables())
def test_each_key_has_a_description(name: str) -> None:
    assert [one.name for one in table_keys(task_tables()[name]) if not one.meaning] == []


@pytest.mark.parametrize("name", sorted(task_tables().keys() - {ROOT}))
def test_the_guide_names_every_table(name: str) -> None:
    assert f"`{name.removeprefix(ROOT + '.')}." in GUIDE or f"`[{name}]`" in GUIDE


def test_the_guide_names_every_key_of_the_task_itself() -> None:
    assert [one.name for one in table_keys(TaskTable) if f"`{one.name}`" not in GUIDE] == []


async def test_validation_lists_every_key_with_value_and_default(tmp_path: Path) -> None:
    path = tiny_task(tmp_path).path
    fedbus = FedbusCli(tmp_path / "home")
    keys = (await fedbus("task", "validate", "--keys", "--json", path)).facts["keys"]
    found = {(one["table"], one["name"]): one for one in keys}
    assert found.keys() == {
        (name, one.name) for name, kind in task_tables().items() for one in table_keys(kind)
    }
    assert found[ROOT, "task"]["given"]
    tolerance = found[f"{ROOT}.gate", "tolerance"]
    assert (tolerance["value"], tolerance["default"], tolerance["given"]) == ("0.1", "0.1", False)
    text = (await fedbus("task", "validate", "--keys", path)).out
    assert all(f"[{name}]" in text for name in task_tables())
