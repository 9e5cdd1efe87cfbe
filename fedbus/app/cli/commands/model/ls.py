"""`fedbus model ls` and `show`: the versions, the champion and the lineage."""

from typing import Annotated, Any

import typer
from rich.tree import Tree

from fedbus.app.cli.commands.model.repository import (
    SHORT_LENGTH,
    Store,
    TaskId,
    Version,
    find_manifest,
    format_metrics,
    manifest_facts,
    run_with_store,
)
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, print_json
from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest, SimulationOrigin
from fedbus.domain.version_status import status_of
from fedbus.stores.models.open import ModelStore


def ls(*, task: TaskId = None, store: Store = "", json: output.JsonOption = False) -> None:
    """List all versions, newest first."""
    rows = run_with_store(_list_versions, task, store)
    if json:
        print_json(rows)
        return
    output.print_table(
        (
            *("version", "", "lineage", "parent", "sha256", "size", "run", "rounds"),
            *("clients (samples)", "metrics", "code", "signed", "weights", "created"),
        ),
        [_version_row(one) for one in rows],
        empty="no versions yet. The server creates the first one when it starts: fedbus up",
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


async def _list_versions(models: ModelStore) -> list[dict[str, Any]]:
    latest, champion, artifacts = (
        await models.read_latest(),
        await models.read_champion(),
        await models.list_artifacts(),
    )
    return [
        manifest_facts(one)
        | {
            "latest": latest is not None and one.version == latest.version,
            "standing": status_of(one, champion),
            "weights_kept": one.sha256 in artifacts,
        }
        for one in reversed(await models.list_versions())
    ]


def _version_row(one: dict[str, Any]) -> tuple[object, ...]:
    clients = one["participants"]
    return (
        f"v{one['version']}",
        one["standing"] or ("latest" if one["latest"] else ""),
        one["lineage"],
        f"v{one['parent']}" if one["parent"] else "",
        one["sha256"][:SHORT_LENGTH],
        output.format_size(one["size_bytes"]),
        one["run"] or "the first model",
        one["rounds"],
        f"{len(clients)} ({sum(clients.values())})" if clients else "",
        format_metrics(one["metrics"], one["evaluation_failure"]),
        one["code_version"][:SHORT_LENGTH],
        one["seal"]["key"][:SHORT_LENGTH] if one["seal"] else "no",
        "kept" if one["weights_kept"] else "retired",
        output.format_age(one["created"]),
    )


def show(
    version: Version = "latest",
    *,
    lineage: Annotated[
        bool, typer.Option("--lineage", help="Show the lineage: all versions, each below its parent.")
    ] = False,
    task: TaskId = None,
    store: Store = "",
    json: output.JsonOption = False,
) -> None:
    """Show the manifest of a version."""
    if lineage:
        _show_lineage(version, task, store, json=json)
        return
    manifest = run_with_store(lambda models: find_manifest(models, version), task, store)
    facts = manifest_facts(manifest)
    if json:
        print_json(facts)
        return
    rows = {name: value for name, value in facts.items() if name not in ("participants", "metrics", "config")}
    if not manifest.evaluation_failure:
        del rows["evaluation_failure"]
    if manifest.simulation is None:
        del rows["simulation"]
    else:
        rows["simulation"] = _describe_simulation(manifest.simulation)
    rows["seal"] = f"signed with the key {manifest.seal.key}" if manifest.seal else "not signed"
    output.console().print(f"[bold]{manifest.task}[/] v{manifest.version}")
    output.print_table(
        ("", ""), [(name, "" if value is None else value) for name, value in rows.items()], empty=""
    )
    output.print_table(("client", "samples"), manifest.participants.items(), empty="no participants")
    output.print_table(
        ("metric", "value"), [(n, f"{v:.6g}") for n, v in manifest.metrics.items()], empty="no metrics"
    )
    if manifest.config:
        output.print_table(("configuration", "value"), manifest.config.items(), empty="")


def _describe_simulation(origin: SimulationOrigin) -> str:
    """Describe the simulation that made a version: ``100 clients, cohort 10, seed 7``."""
    parts = [
        pluralize(origin.clients, "client"),
        f"cohort {origin.cohort}" if origin.cohort else "",
        f"partition {origin.partition}" if origin.partition else "",
        f"profile {origin.profile[:SHORT_LENGTH]}" if origin.profile else "",
        *(f"{name} {value}" for name, value in origin.aggregation.items()),
        f"seed {origin.seed}" if origin.seed is not None else "no seed",
        "deterministic" if origin.deterministic else "",
        f"engine {origin.engine}",
        f"fedbus {origin.fedbus}",
    ]
    return ", ".join(filter(None, parts))


# --- lineage ----------------------------------------------------------------------------------


def _show_lineage(version: str, task: str | None, store: str, *, json: bool) -> None:
    async def read(models: ModelStore) -> tuple[list[Manifest], Manifest, Champion | None]:
        return (
            await models.list_versions(),
            await find_manifest(models, version),
            await models.read_champion(),
        )

    versions, shown, champion = run_with_store(read, task, store)
    if json:
        print_json(
            [
                manifest_facts(one)
                | {"shown": one.version == shown.version, "standing": status_of(one, champion)}
                for one in versions
            ]
        )
    else:
        output.console().print(_lineage_tree(versions, shown, champion))


def _lineage_tree(versions: list[Manifest], shown: Manifest, champion: Champion | None) -> Tree:
    """Draw each version below its parent."""
    root = Tree(f"[bold]{shown.task}[/]")
    branches: dict[int, Tree] = {}
    for one in versions:  # oldest first: a parent comes before its children
        under = branches.get(one.parent or 0, root)
        branches[one.version] = under.add(_tree_label(one, champion, is_shown=one.version == shown.version))
    return root


def _tree_label(one: Manifest, champion: Champion | None, *, is_shown: bool) -> str:
    name = f"[bold]v{one.version}[/]" if is_shown else f"v{one.version}"
    status = status_of(one, champion)
    mark = {"champion": "  [green]champion[/]", "": ""}.get(status, f"  [dim]{status}[/]")
    run = one.run or f"the first model of lineage {one.lineage}"
    digest, code = one.sha256[:SHORT_LENGTH], one.code_version[:SHORT_LENGTH]
    metrics = format_metrics(one.metrics, one.evaluation_failure)
    return f"{name}{mark}  {digest}  {run}  {metrics}  code {code}"
