"""Every key that a task may have, read off the tables: for a page, and for `fedbus task validate --keys`."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

from fedbus.app.docs_generator.model_docs import FieldEntry, docstring_of, field_entries, to_json_text
from fedbus.contracts.task.base import ConfigSection
from fedbus.contracts.task.task import TaskTable

ROOT: Final = "tool.fedbus"
EMPTY_DEFAULTS: Final = ("null", '""')
"""A default that is none: what then happens, the key's own words say."""
TITLE: Final = """\
# Every key of a task

Written from the tables in `fedbus/contracts` by `make docs`; do not edit. What they are for, with examples, is told in
[your own task](tasks.md). With the values of one task: `fedbus task validate --keys DIRECTORY`."""


def task_tables() -> dict[str, type[ConfigSection]]:
    """Each table by its name in the file: ``tool.fedbus``, ``tool.fedbus.gate``, …"""
    parts = {f"{ROOT}.{_alias(name)}": kind for name, kind in _sub_tables(TaskTable)}
    return {ROOT: TaskTable, **parts}


def table_keys(kind: type[ConfigSection]) -> list[FieldEntry]:
    """The keys of one table; a table in it is one of its own, and none of its keys."""
    own = {kind.model_fields[name].alias or name for name in _own_fields(kind)}
    return [field for field in field_entries(kind) if field.name in own]


def table_values(table: TaskTable) -> list[dict[str, Any]]:
    """Every key with its value in one task's *table*, its default, and whether the task says it."""
    found: list[dict[str, Any]] = []
    for name, kind in task_tables().items():
        part = table if kind is TaskTable else getattr(table, name.rpartition(".")[2])
        for field, one in zip(_own_fields(kind), table_keys(kind), strict=True):
            given = field in part.model_fields_set
            value = to_json_text(getattr(part, field))
            found.append({"table": name, **asdict(one), "value": value, "given": given})
    return found


def task_keys_page() -> str:
    lines = [TITLE]
    for name, kind in task_tables().items():
        lines += ["", f"## `[{name}]`", "", *([] if kind is TaskTable else [docstring_of(kind), ""])]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        lines += [
            f"| `{one.name}` | {_format_default(one)} | {one.meaning.replace('``', '`')} |"
            for one in table_keys(kind)
        ]
    return "\n".join(lines) + "\n"


def _format_default(one: FieldEntry) -> str:
    if not one.default:
        return "has to be there"
    return "none" if one.default in EMPTY_DEFAULTS else f"`{one.default}`"


def _sub_tables(kind: type[ConfigSection]) -> Iterator[tuple[str, type[ConfigSection]]]:
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, ConfigSection):
            yield name, field.annotation


def _own_fields(kind: type[ConfigSection]) -> list[str]:
    inner = {name for name, _ in _sub_tables(kind)}
    return [name for name in kind.model_fields if name not in inner]


def _alias(name: str) -> str:
    return TaskTable.model_fields[name].alias or name
