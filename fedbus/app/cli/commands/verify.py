"""`fedbus verify`: from which code, configuration, clients and updates a run's model came, and whether that holds.

Everything is read anew: the log of the bus, the bytes in the model repository, the commit in the code's. What can no
longer be told is said to be open; what does not fit is listed, and the exit code says so.
"""

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedbus.app.cli.commands.model.repository import SHORT, Store, address_of, opened
from fedbus.app.failures import Failure
from fedbus.app.terminal import output

if TYPE_CHECKING:
    from fedbus.app.diagnostics.model_provenance import Kept, Told
    from fedbus.app.terminal.progress_bar import Step
    from fedbus.contracts.champion import Champion
    from fedbus.domain.provenance import Finding

MARKS: Final = {"fits": ("✓", "green"), "not checked": ("?", "yellow"), "does not fit": ("✗", "red")}
UPDATES_SHOWN: Final = 40
STAGES: Final = 3
"""The manifests, the weights of the version, and the code."""


def verify(
    run: Annotated[str, typer.Argument(help="The run, as `fedbus run ls` calls it.")],
    *,
    repo: Annotated[
        str,
        typer.Option(
            "--repo",
            help="The code's repository, as `fedbus up --task` has it. "
            "[default: FEDBUS_TASK, or what the server follows]",
        ),
    ] = "",
    store: Store = "",
    updates: Annotated[bool, typer.Option("--updates", help="List every update, however many.")] = False,
    json: output.AsJson = False,
) -> None:
    """Show which code, configuration, clients and updates made a run's model, and check each of them.

    With FEDBUS_TRUSTED_KEYS, also the model's signature; with FEDBUS_ALLOWED_SIGNERS, the commit's.
    """
    from fedbus.app.bus_session import now
    from fedbus.contracts.identifiers import check_id

    facts = now(_looked(check_id("run", run), repo, address_of(store)))
    if json:
        output.as_json(facts)
    else:
        _tell(facts, limit=None if updates else UPDATES_SHOWN)
    wrong = [one for one in facts["findings"] if one["fit"] == "does not fit"]
    if wrong:
        raise Failure("; ".join(f"{one['about']}: {one['says']}" for one in wrong))


async def _looked(run: str, repo: str, url: str) -> dict[str, Any]:
    from fedbus.app.bus_session import on_the_bus
    from fedbus.app.diagnostics.model_provenance import told_of
    from fedbus.app.terminal.progress_bar import working

    with working(f"reading the log of {run}") as step:
        async with on_the_bus() as bus:
            told = await told_of(bus, run, read=lambda what: step(1, what))
    with working(f"verifying {run}:", total=STAGES) as step:
        return await _checked(told, repo, url, step)


async def _checked(told: "Told", repo: str, url: str, step: "Step") -> dict[str, Any]:
    from fedbus.app.diagnostics import model_provenance
    from fedbus.app.settings import Settings
    from fedbus.domain.provenance import Finding, Fit

    settings = Settings.from_environment()
    trusted, findings = settings.trusted(), list(model_provenance.of_run(told))
    kept, champion = None, None
    if (made := told.facts.model) is None:
        findings.insert(1, model_provenance.of_nothing(told))
    else:
        step(0, "its manifest")
        models = opened(url, told.facts.task)
        found = await model_provenance.kept_of(models, made.version)
        if isinstance(found, str):
            findings.insert(1, Finding("manifest", Fit.NO, found))
        else:
            kept, champion = found, await model_provenance.served(models)
            step(1, f"the weights of v{made.version}, {output.size(found.manifest.size_bytes)}")
            about = [one async for one in model_provenance.of_version(models, told, kept, trusted)]
            findings[1:1] = about
    step(1, "its code")
    code = await model_provenance.of_code(told, kept.manifest if kept else None, repo, settings)
    findings.insert(-2, code)
    return _facts(told, kept, champion, findings)


def _facts(
    told: "Told", kept: "Kept | None", champion: "Champion | None", findings: "list[Finding]"
) -> dict[str, Any]:
    from dataclasses import asdict

    from fedbus.domain.provenance import Fit, ancestry
    from fedbus.domain.version_status import standing

    facts, manifest = told.facts, kept.manifest if kept else None
    return {
        "run": facts.run,
        "task": facts.task,
        "state": told.last.target,
        "since": told.since,
        "sound": all(one.fit is not Fit.NO for one in findings),
        "findings": [asdict(one) for one in findings],
        "manifest": manifest.model_dump() if manifest else None,
        "standing": standing(manifest.version, champion) if manifest else "",
        "made_from": [one.version for one in ancestry(manifest, kept.known)[0]] if manifest and kept else [],
        "code_version": facts.code_version,
        "plan": facts.plan.model_dump(),
        "trigger": facts.trigger,
        "rounds": [one.model_dump() | {"loss": one.loss, "accuracy": one.accuracy} for one in told.rounds],
        "updates": [asdict(one) for one in told.updates],
        "log_begins": told.forgotten_before,
        "trace_id": facts.trace_id,
    }


# --- for people ------------------------------------------------------------------------------------


def _tell(facts: dict[str, Any], *, limit: int | None) -> None:
    from rich.table import Table
    from rich.text import Text

    console = output.console()
    console.print(_heading(facts))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    for one in facts["findings"]:
        mark, style = MARKS[one["fit"]]
        says = Text(output.printable(one["says"]), overflow="fold")
        grid.add_row(Text(f"  {mark}", style=style), one["about"], says)
    console.print(grid, soft_wrap=False)
    console.print()
    _tell_rounds(facts["rounds"])
    _tell_updates(facts["updates"], limit)
    if facts["trace_id"].strip("0"):  # all zeros: nobody traced
        console.print(f"\ntrace {facts['trace_id']}: fedbus trace {facts['run']}")


def _heading(facts: dict[str, Any]) -> str:
    from rich.markup import escape

    made = f"version {facts['manifest']['version']}" if facts["manifest"] else "no version"
    standing = f", {facts['standing']}" if facts["standing"] else ""
    return f"[bold]{escape(facts['run'])}[/] {facts['state']} {output.ago(facts['since'])}: {made}{standing}"


def _tell_rounds(rounds: list[dict[str, Any]]) -> None:
    output.table(
        ("round", "loss", "accuracy", "clients (samples)", "failures"),
        [
            (
                one["round"],
                _figure(one["loss"]),
                _figure(one["accuracy"]),
                ", ".join(f"{client} ({samples})" for client, samples in sorted(one["participants"].items())),
                ", ".join(f"{client}: {why}" for client, why in one["failures"].items()),
            )
            for one in rounds
        ],
        empty="no round was finished",
    )


def _tell_updates(updates: "list[dict[str, Any]]", limit: int | None) -> None:
    if not updates:
        return
    output.console().print()
    output.table(
        ("round", "client", "update", "size", "trained for"),
        [
            (
                "" if one["round"] is None else one["round"],
                one["client"],
                one["error"] or one["sha256"][:SHORT] or "in the event itself",
                output.size(one["size_bytes"]) if not one["error"] else "",
                f"{one['train_s']:.2f} s",
            )
            for one in updates[:limit]
        ],
        empty="",
    )
    if limit is not None and len(updates) > limit:
        output.note(f"and {len(updates) - limit} more updates: fedbus verify … --updates")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
