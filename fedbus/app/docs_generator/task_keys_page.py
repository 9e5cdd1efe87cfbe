"""Every key that a task may have, read off the tables: for a page, and for `fedbus task validate --keys`."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

from fedbus.app.docs_generator.model_docs import FieldEntry, fields, in_json, meaning
from fedbus.contracts.task.base import Table
from fedbus.contracts.task.task import TaskTable

ROOT: Final = "tool.fedbus"
LEFT_OUT: Final = ("null", '""')
"""A default that is none: what then happens, the key's own words say."""
TITLE: Final = """\
# Every key of a task

Written from the tables in `fedbus/contracts` by `make docs`; do not edit. What they are for, with examples, is told in
[your own task](tasks.md). With the values of one task: `fedbus task validate --keys DIRECTORY`."""


def tables() -> dict[str, type[Table]]:
    """Each table by its name in the file: ``tool.fedbus``, ``tool.fedbus.gate``, …"""
    parts = {f"{ROOT}.{_alias(name)}": kind for name, kind in _parts(TaskTable)}
    return {ROOT: TaskTable, **parts}


def keys(kind: type[Table]) -> list[FieldEntry]:
    """The keys of one table; a table in it is one of its own, and none of its keys."""
    own = {kind.model_fields[name].alias or name for name in _own(kind)}
    return [field for field in fields(kind) if field.name in own]


def values(table: TaskTable) -> list[dict[str, Any]]:
    """Every key with its value in one task's *table*, its default, and whether the task says it."""
    found: list[dict[str, Any]] = []
    for name, kind in tables().items():
        part = table if kind is TaskTable else getattr(table, name.rpartition(".")[2])
        for field, one in zip(_own(kind), keys(kind), strict=True):
            given = field in part.model_fields_set
            value = in_json(getattr(part, field))
            found.append({"table": name, **asdict(one), "value": value, "given": given})
    return found


def task_keys_page() -> str:
    lines = [TITLE]
    for name, kind in tables().items():
        lines += ["", f"## `[{name}]`", "", *([] if kind is TaskTable else [meaning(kind), ""])]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        lines += [
            f"| `{one.name}` | {_default(one)} | {one.meaning.replace('``', '`')} |" for one in keys(kind)
        ]
    return "\n".join(lines) + "\n"


def _default(one: FieldEntry) -> str:
    if not one.default:
        return "has to be there"
    return "none" if one.default in LEFT_OUT else f"`{one.default}`"


def _parts(kind: type[Table]) -> Iterator[tuple[str, type[Table]]]:
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Table):
            yield name, field.annotation


def _own(kind: type[Table]) -> list[str]:
    inner = {name for name, _ in _parts(kind)}
    return [name for name in kind.model_fields if name not in inner]


def _alias(name: str) -> str:
    return TaskTable.model_fields[name].alias or name
