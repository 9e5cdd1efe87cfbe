"""`fedbus model ls` and `show`: what there is, which is served, and what was made of what."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbus.app.cli.commands.model.repository import (
    SHORT,
    Store,
    TaskId,
    Version,
    facts_of,
    find,
    headline,
    with_store,
)
from fedbus.app.terminal import output

if TYPE_CHECKING:
    from rich.tree import Tree

    from fedbus.contracts.champion import Champion
    from fedbus.contracts.model import Manifest
    from fedbus.stores.models.open import ModelStore


def ls(*, task: TaskId = None, store: Store = "", json: output.AsJson = False) -> None:
    """List all versions, newest first."""
    rows = with_store(_listed, task, store)
    if json:
        output.as_json(rows)
        return
    output.table(
        (
            *("version", "", "lineage", "parent", "sha256", "size", "run", "rounds"),
            *("clients (samples)", "metrics", "code", "signed", "weights", "made"),
        ),
        [_row(one) for one in rows],
        empty="no version yet: the server makes the first one when it starts. See: fedbus up",
        least=(
            "signed",
            "weights",
            "size",
            "lineage",
            "rounds",
            "sha256",
            "parent",
            "clients (samples)",
            "code",
        ),
    )


async def _listed(models: "ModelStore") -> list[dict[str, Any]]:
    from fedbus.domain.version_status import standing

    latest, champion, held = await models.latest(), await models.champion(), await models.held()
    return [
        facts_of(one)
        | {
            "latest": latest is not None and one.version == latest.version,
            "standing": standing(one.version, champion),
            "weights_kept": one.sha256 in held,
        }
        for one in reversed(await models.versions())
    ]


def _row(one: dict[str, Any]) -> tuple[object, ...]:
    clients = one["participants"]
    return (
        f"v{one['version']}",
        one["standing"] or ("latest" if one["latest"] else ""),
        one["lineage"],
        f"v{one['parent']}" if one["parent"] else "",
        one["sha256"][:SHORT],
        output.size(one["size_bytes"]),
        one["run"] or "the first model",
        one["rounds"],
        f"{len(clients)} ({sum(clients.values())})" if clients else "",
        headline(one["metrics"]),
        one["code_version"][:SHORT],
        one["seal"]["key"][:SHORT] if one["seal"] else "no",
        "kept" if one["weights_kept"] else "retired",
        output.ago(one["created"]),
    )


def show_(
    version: Version = "latest",
    *,
    lineage: Annotated[bool, typer.Option("--lineage", help="From which version each was made.")] = False,
    task: TaskId = None,
    store: Store = "",
    json: output.AsJson = False,
) -> None:
    """Show all that is known of a version."""
    if lineage:
        _show_lineage(version, task, store, json=json)
        return
    found = with_store(lambda models: find(models, version), task, store)
    facts = facts_of(found)
    if json:
        output.as_json(facts)
        return
    rows = {name: value for name, value in facts.items() if name not in ("participants", "metrics", "config")}
    rows["seal"] = f"signed with the key {found.seal.key}" if found.seal else "not signed"
    output.console().print(f"[bold]{found.task}[/] v{found.version}")
    output.table(("", ""), [(name, "" if value is None else value) for name, value in rows.items()], empty="")
    output.table(("client", "samples"), found.participants.items(), empty="no client took part in it")
    output.table(("metric", "value"), [(n, f"{v:.6g}") for n, v in found.metrics.items()], empty="no metrics")
    if found.config:
        output.table(("configuration", "value"), found.config.items(), empty="")


# --- lineage ----------------------------------------------------------------------------------


def _show_lineage(version: str, task: str | None, store: str, *, json: bool) -> None:
    from fedbus.domain.version_status import standing

    async def read(models: "ModelStore") -> tuple[list["Manifest"], "Manifest", "Champion | None"]:
        return await models.versions(), await find(models, version), await models.champion()

    versions, asked, champion = with_store(read, task, store)
    if json:
        output.as_json(
            [
                facts_of(one)
                | {"shown": one.version == asked.version, "standing": standing(one.version, champion)}
                for one in versions
            ]
        )
    else:
        output.console().print(_tree(versions, asked, champion))


def _tree(versions: list["Manifest"], asked: "Manifest", champion: "Champion | None") -> "Tree":
    """Each version under the one that it was made from."""
    from rich.tree import Tree

    root = Tree(f"[bold]{asked.task}[/]")
    branches: dict[int, Tree] = {}
    for one in versions:  # oldest first: a parent comes before its children
        under = branches.get(one.parent or 0, root)
        branches[one.version] = under.add(_leaf(one, champion, asked=one.version == asked.version))
    return root


def _leaf(one: "Manifest", champion: "Champion | None", *, asked: bool) -> str:
    from fedbus.domain.version_status import standing

    name = f"[bold]v{one.version}[/]" if asked else f"v{one.version}"
    how = standing(one.version, champion)
    mark = {"champion": "  [green]champion[/]", "": ""}.get(how, f"  [dim]{how}[/]")
    run = one.run or f"the first model of lineage {one.lineage}"
    return (
        f"{name}{mark}  {one.sha256[:SHORT]}  {run}  {headline(one.metrics)}  code {one.code_version[:SHORT]}"
    )
