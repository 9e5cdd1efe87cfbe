"""`fedbus model verify`: whether what is kept is what it says, and signed where keys are trusted."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbus.app.cli.commands.model.repository import SHORT, Store, TaskId, number_of, with_store
from fedbus.app.failures import Failure
from fedbus.app.terminal import output

if TYPE_CHECKING:
    from fedbus.stores.models.open import ModelStore
    from fedbus.stores.models.signing import TrustedKeys


def verify(
    versions: Annotated[list[str] | None, typer.Argument(help="Only these.", show_default="all")] = None,
    *,
    task: TaskId = None,
    store: Store = "",
    json: output.AsJson = False,
) -> None:
    """Read every manifest and every artifact where it is kept, and see whether it is what it says.

    With FEDBUS_TRUSTED_KEYS, also whether one of those keys has signed it.
    """
    from fedbus.app.settings import Settings
    from fedbus.app.terminal.progress_bar import working

    async def read(models: "ModelStore") -> tuple[list[dict[str, Any]], str]:
        numbers = await models.numbers()
        latest = await models.latest()
        asked = [number_of(one, latest.version if latest else 0) for one in versions or ()] or numbers
        found = []
        with working("verifying", total=len(asked)) as step:
            for number in asked:
                step(0, f"v{number}")
                found.append(await _verified(models, number, numbers, trusted))
                step(1, f"v{number}")
        return found, await _wrong_with_champion(models, numbers)

    trusted = Settings.from_environment().trusted()
    found, crown = with_store(read, task, store)
    complaints = [f"v{one['version']}: {one['complaint']}" for one in found if one["complaint"]]
    complaints += [crown] if crown else []
    if json:
        output.as_json(found)
    else:
        output.table(
            ("version", "sha256", "size", ""),
            [
                (
                    f"v{one['version']}",
                    (one["sha256"] or "")[:SHORT],
                    output.size(one["size_bytes"]) if one["size_bytes"] else "",
                    "bad" if one["complaint"] else "retired" if one["retired"] else "sound",
                )
                for one in found
            ],
            empty="no version yet",
        )
    if complaints:
        raise Failure("; ".join(complaints))


async def _verified(
    models: "ModelStore", number: int, known: list[int], trusted: "TrustedKeys | None"
) -> dict[str, Any]:
    """What is wrong with a version; an empty complaint where nothing is."""
    from fedbus.stores.errors import StoreDamaged
    from fedbus.stores.models.open import ArtifactMissing, ArtifactRetired
    from fedbus.stores.models.signing import Unsigned, WronglySigned

    facts: dict[str, Any] = {"version": number, "sha256": None, "size_bytes": None}
    facts |= {"retired": False, "complaint": ""}
    try:
        manifest = await models.manifest(number)
        facts |= {"sha256": manifest.sha256, "size_bytes": manifest.size_bytes}
        if trusted is not None:
            trusted.check_manifest(manifest)
        if manifest.parent is not None and manifest.parent not in known:
            facts["complaint"] = f"its parent, version {manifest.parent}, is not there"
        await models.verify(manifest.sha256)
    except ArtifactRetired:
        facts["retired"] = True
    except (StoreDamaged, ArtifactMissing, Unsigned, WronglySigned) as error:
        facts["complaint"] = str(error)
    return facts


async def _wrong_with_champion(models: "ModelStore", known: list[int]) -> str:
    """What is wrong with the pointer to the version that is served; empty where nothing is."""
    from fedbus.stores.errors import StoreDamaged

    try:
        champion = await models.champion()
    except StoreDamaged as error:
        return str(error)
    if champion is not None and champion.version not in known:
        return f"the champion is version {champion.version}, which is not there"
    return ""
