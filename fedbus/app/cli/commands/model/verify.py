"""`fedbus model verify`: check the manifests, weights and signatures in the model repository."""

from typing import Annotated, Any

import typer

from fedbus.app.cli.commands.model.repository import (
    SHORT_LENGTH,
    Store,
    TaskId,
    parse_version,
    run_with_store,
)
from fedbus.app.failures import CliError
from fedbus.app.settings import Settings
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.stores.errors import StoreCorrupt
from fedbus.stores.models.open import ArtifactMissing, ArtifactRetired, ModelStore
from fedbus.stores.models.signing import SignatureInvalid, SignatureMissing, TrustedKeys


def verify(
    versions: Annotated[
        list[str] | None, typer.Argument(help="Only these versions.", show_default="all")
    ] = None,
    *,
    task: TaskId = None,
    store: Store = "",
    json: output.JsonOption = False,
) -> None:
    """Read all manifests and weights in the repository and verify their digests.

    With FEDBUS_TRUSTED_KEYS, also verify the signatures.
    """

    async def read(models: ModelStore) -> tuple[list[dict[str, Any]], str]:
        numbers = await models.list_version_numbers()
        latest = await models.read_latest()
        selected = [parse_version(one, latest.version if latest else 0) for one in versions or ()] or numbers
        results = []
        with progress_bar("verifying", total=len(selected)) as step:
            for number in selected:
                step(0, f"v{number}")
                results.append(await _verify_version(models, number, numbers, trusted))
                step(1, f"v{number}")
        return results, await _champion_problem(models, numbers)

    trusted = Settings.from_environment().load_trusted_keys()
    results, champion_problem = run_with_store(read, task, store)
    problems = [f"v{one['version']}: {one['complaint']}" for one in results if one["complaint"]]
    problems += [champion_problem] if champion_problem else []
    if json:
        print_json(results)
    else:
        output.print_table(
            ("version", "sha256", "size", ""),
            [
                (
                    f"v{one['version']}",
                    (one["sha256"] or "")[:SHORT_LENGTH],
                    output.format_size(one["size_bytes"]) if one["size_bytes"] else "",
                    "bad" if one["complaint"] else "retired" if one["retired"] else "sound",
                )
                for one in results
            ],
            empty="no versions yet",
        )
    if problems:
        raise CliError("; ".join(problems))


async def _verify_version(
    models: ModelStore, number: int, existing: list[int], trusted: TrustedKeys | None
) -> dict[str, Any]:
    """Verify a version; the complaint is empty if it is valid."""
    facts: dict[str, Any] = {"version": number, "sha256": None, "size_bytes": None}
    facts |= {"retired": False, "complaint": ""}
    try:
        manifest = await models.read_manifest(number)
        facts |= {"sha256": manifest.sha256, "size_bytes": manifest.size_bytes}
        if trusted is not None:
            trusted.verify_manifest(manifest)
        if manifest.parent is not None and manifest.parent not in existing:
            facts["complaint"] = f"its parent, version {manifest.parent}, is missing"
        await models.verify(manifest.sha256)
    except ArtifactRetired:
        facts["retired"] = True
    except (StoreCorrupt, ArtifactMissing, SignatureMissing, SignatureInvalid) as error:
        facts["complaint"] = str(error)
    return facts


async def _champion_problem(models: ModelStore, existing: list[int]) -> str:
    """Return the problem of the pointer to the champion; empty if there is none."""
    try:
        champion = await models.read_champion()
    except StoreCorrupt as error:
        return str(error)
    if champion is not None and champion.version not in existing:
        return f"the champion is version {champion.version}, which is missing"
    return ""
