"""`fedbus verify`: check the provenance of a run's model: code, configuration, clients and updates.

Each check reads its source: the streams, the files in the model repository, the commit in the code repository. A check
without a source is reported as not checked. A mismatch is listed, and the exit code is 1.
"""

from dataclasses import asdict
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedbus.app.bus_session import connect_bus, run_async
from fedbus.app.cli.commands.model.repository import SHORT_LENGTH, Store, open_models, store_address
from fedbus.app.diagnostics import model_provenance
from fedbus.app.diagnostics.model_provenance import RunLog, StoredVersion, load_run_log
from fedbus.app.failures import CliError
from fedbus.app.settings import Settings
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json, printable
from fedbus.app.terminal.progress_bar import Advance, progress_bar
from fedbus.contracts.champion import Champion
from fedbus.contracts.identifiers import check_id
from fedbus.domain.provenance import CheckOutcome, ProvenanceFinding, trace_ancestry
from fedbus.domain.version_status import status_of

MARKS: Final = {"fits": ("✓", "green"), "not checked": ("?", "yellow"), "does not fit": ("✗", "red")}
MAX_UPDATES_SHOWN: Final = 40
STAGES: Final = 3
"""The manifests, the weights of the version, and the code."""


def verify(
    run: Annotated[str, typer.Argument(help="The run's id, from `fedbus run ls`.")],
    *,
    repo: Annotated[
        str,
        typer.Option(
            "--repo",
            help="The code repository, in the format of `fedbus up --task`.",
            show_default="FEDBUS_TASK, or the one that the server follows",
        ),
    ] = "",
    store: Store = "",
    updates: Annotated[bool, typer.Option("--updates", help="List all updates.")] = False,
    json: output.JsonOption = False,
) -> None:
    """Show and verify the code, configuration, clients and updates of a run's model.

    With FEDBUS_TRUSTED_KEYS also the signature of the model, with FEDBUS_ALLOWED_SIGNERS that of the commit.
    """
    facts = run_async(_verify_run(check_id("run", run), repo, store_address(store)))
    if json:
        print_json(facts)
    else:
        _print_report(facts, limit=None if updates else MAX_UPDATES_SHOWN)
    mismatches = [one for one in facts["findings"] if one["fit"] == "does not fit"]
    if mismatches:
        raise CliError("; ".join(f"{one['about']}: {one['says']}" for one in mismatches))


async def _verify_run(run: str, repo: str, url: str) -> dict[str, Any]:
    with progress_bar(f"reading the messages of {run}") as step:
        async with connect_bus() as bus:
            run_log = await load_run_log(bus, run, read=lambda what: step(1, what))
    with progress_bar(f"verifying {run}:", total=STAGES) as step:
        return await _check_run(run_log, repo, url, step)


async def _check_run(run_log: RunLog, repo: str, url: str, step: Advance) -> dict[str, Any]:
    settings = Settings.from_environment()
    trusted, findings = settings.load_trusted_keys(), list(model_provenance.check_run(run_log))
    stored, champion = None, None
    if (model_ref := run_log.facts.model) is None:
        findings.insert(1, model_provenance.missing_version_finding(run_log))
    else:
        step(0, "manifest")
        models = open_models(url, run_log.facts.task)
        stored_version = await model_provenance.load_stored_version(models, model_ref.version)
        if isinstance(stored_version, str):
            findings.insert(1, ProvenanceFinding("manifest", CheckOutcome.MISMATCH, stored_version))
        else:
            stored, champion = stored_version, await model_provenance.load_champion(models)
            step(
                1,
                f"weights of v{model_ref.version}, {output.format_size(stored_version.manifest.size_bytes)}",
            )
            checks = [one async for one in model_provenance.check_version(models, run_log, stored, trusted)]
            findings[1:1] = checks
    step(1, "code")
    code = await model_provenance.check_code(run_log, stored.manifest if stored else None, repo, settings)
    findings.insert(-2, code)
    return _report_facts(run_log, stored, champion, findings)


def _report_facts(
    run_log: RunLog,
    stored: StoredVersion | None,
    champion: Champion | None,
    findings: list[ProvenanceFinding],
) -> dict[str, Any]:
    facts, manifest = run_log.facts, stored.manifest if stored else None
    return {
        "run": facts.run,
        "task": facts.task,
        "state": run_log.last_transition.target,
        "since": run_log.since,
        "sound": all(one.outcome is not CheckOutcome.MISMATCH for one in findings),
        "findings": [{"about": one.subject, "fit": one.outcome, "says": one.detail} for one in findings],
        "manifest": manifest.model_dump() if manifest else None,
        "standing": status_of(manifest, champion) if manifest else "",
        "made_from": [one.version for one in trace_ancestry(manifest, stored.manifests)[0]]
        if manifest and stored
        else [],
        "code_version": facts.code_version,
        "plan": facts.plan.model_dump(),
        "trigger": facts.trigger,
        "rounds": [one.model_dump() | {"loss": one.loss, "accuracy": one.accuracy} for one in run_log.rounds],
        "updates": [asdict(one) for one in run_log.updates],
        "log_begins": run_log.log_begins,
        "trace_id": facts.trace_id,
    }


# --- tables ----------------------------------------------------------------------------------------


def _print_report(facts: dict[str, Any], *, limit: int | None) -> None:
    console = output.console()
    console.print(_format_heading(facts))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    for one in facts["findings"]:
        mark, style = MARKS[one["fit"]]
        detail = Text(printable(one["says"]), overflow="fold")
        grid.add_row(Text(f"  {mark}", style=style), one["about"], detail)
    console.print(grid, soft_wrap=False)
    console.print()
    _print_rounds(facts["rounds"])
    _print_updates(facts["updates"], limit)
    if facts["trace_id"].strip("0"):  # all zeros: the run was not traced
        console.print(f"\ntrace {facts['trace_id']}: fedbus trace {facts['run']}")


def _format_heading(facts: dict[str, Any]) -> str:
    version = f"version {facts['manifest']['version']}" if facts["manifest"] else "no version"
    status = f", {facts['standing']}" if facts["standing"] else ""
    return f"[bold]{escape(facts['run'])}[/] {facts['state']} {output.format_age(facts['since'])}: {version}{status}"


def _print_rounds(rounds: list[dict[str, Any]]) -> None:
    output.print_table(
        ("round", "loss", "accuracy", "clients (samples)", "failures"),
        [
            (
                one["round"],
                _format_number(one["loss"]),
                _format_number(one["accuracy"]),
                ", ".join(f"{client} ({samples})" for client, samples in sorted(one["participants"].items())),
                ", ".join(f"{client}: {why}" for client, why in one["failures"].items()),
            )
            for one in rounds
        ],
        empty="no finished rounds",
    )


def _print_updates(updates: list[dict[str, Any]], limit: int | None) -> None:
    if not updates:
        return
    output.console().print()
    output.print_table(
        ("round", "client", "update", "size", "training"),
        [
            (
                "" if one["round"] is None else one["round"],
                one["client"],
                one["error"] or one["sha256"][:SHORT_LENGTH] or "inline",
                output.format_size(one["size_bytes"]) if not one["error"] else "",
                f"{one['train_s']:.2f} s",
            )
            for one in updates[:limit]
        ],
        empty="",
    )
    if limit is not None and len(updates) > limit:
        output.print_note(f"{len(updates) - limit} more updates. Show all: fedbus verify … --updates")


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
