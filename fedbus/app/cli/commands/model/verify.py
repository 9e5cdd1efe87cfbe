"""`fedbus model verify`: whether what is kept is what it says, and signed where keys are trusted."""

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
    versions: Annotated[list[str] | None, typer.Argument(help="Only these.", show_default="all")] = None,
    *,
    task: TaskId = None,
    store: Store = "",
    json: output.JsonOption = False,
) -> None:
    """Read every manifest and every artifact where it is kept, and see whether it is what it says.

    With FEDBUS_TRUSTED_KEYS, also whether one of those keys has signed it.
    """

    async def read(models: ModelStore) -> tuple[list[dict[str, Any]], str]:
        numbers = await models.list_version_numbers()
        latest = await models.latest()
        asked = [parse_version(one, latest.version if latest else 0) for one in versions or ()] or numbers
        found = []
        with progress_bar("verifying", total=len(asked)) as step:
            for number in asked:
                step(0, f"v{number}")
                found.append(await _verify_version(models, number, numbers, trusted))
                step(1, f"v{number}")
        return found, await _champion_problem(models, numbers)

    trusted = Settings.from_environment().trusted()
    found, crown = run_with_store(read, task, store)
    complaints = [f"v{one['version']}: {one['complaint']}" for one in found if one["complaint"]]
    complaints += [crown] if crown else []
    if json:
        print_json(found)
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
                for one in found
            ],
            empty="no version yet",
        )
    if complaints:
        raise CliError("; ".join(complaints))


async def _verify_version(
    models: ModelStore, number: int, known: list[int], trusted: TrustedKeys | None
) -> dict[str, Any]:
    """What is wrong with a version; an empty complaint where nothing is."""
    facts: dict[str, Any] = {"version": number, "sha256": None, "size_bytes": None}
    facts |= {"retired": False, "complaint": ""}
    try:
        manifest = await models.manifest(number)
        facts |= {"sha256": manifest.sha256, "size_bytes": manifest.size_bytes}
        if trusted is not None:
            trusted.verify_manifest(manifest)
        if manifest.parent is not None and manifest.parent not in known:
            facts["complaint"] = f"its parent, version {manifest.parent}, is not there"
        await models.verify(manifest.sha256)
    except ArtifactRetired:
        facts["retired"] = True
    except (StoreCorrupt, ArtifactMissing, SignatureMissing, SignatureInvalid) as error:
        facts["complaint"] = str(error)
    return facts


async def _champion_problem(models: ModelStore, known: list[int]) -> str:
    """What is wrong with the pointer to the version that is served; empty where nothing is."""
    try:
        champion = await models.champion()
    except StoreCorrupt as error:
        return str(error)
    if champion is not None and champion.version not in known:
        return f"the champion is version {champion.version}, which is not there"
    return ""
