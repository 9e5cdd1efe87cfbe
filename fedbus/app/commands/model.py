"""`fedbus model`: what the model repository holds, and whether it is what it says.

The repository is read itself, with no bus and no server: a directory or an S3, see
`fedbus.stores.models`.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from fedbus.app import show
from fedbus.app.edge import Exit, Failure

if TYPE_CHECKING:
    from rich.tree import Tree

    from fedbus.contracts.model import Manifest
    from fedbus.learning.weights import Arrays
    from fedbus.stores.models import ModelStore

PATIENCE_S: Final = 3.0
"""How long a person waits for an S3 that does not answer."""
SHORT: Final = 12

app = typer.Typer(
    no_args_is_help=True, help="The versions of a task's model: what is there, and is it sound."
)

TaskId = Annotated[str | None, typer.Option("--task", help="The task's id. [default: the only one there]")]
Store = Annotated[
    str,
    typer.Option(help="The model repository: a directory, or s3://bucket/prefix. [default: FEDBUS_STORE]"),
]
Version = Annotated[str, typer.Argument(help="A version's number, v3 or 3, or: latest.")]

T = TypeVar("T")


@app.command()
def ls(*, task: TaskId = None, store: Store = "", json: show.AsJson = False) -> None:
    """List all versions, newest first."""

    async def read(models: "ModelStore") -> tuple[list["Manifest"], int]:
        latest = await models.latest()
        return await models.versions(), latest.version if latest else 0

    versions, latest = _with_store(read, task, store)
    versions = versions[::-1]
    if json:
        show.as_json([_facts(one) | {"latest": one.version == latest} for one in versions])
        return
    show.table(
        ("version", "", "sha256", "size", "run", "rounds", "clients (samples)", "metrics", "made"),
        [
            (
                f"v{one.version}",
                "latest" if one.version == latest else "",
                one.sha256[:SHORT],
                show.size(one.size_bytes),
                one.run or "the first model",
                one.rounds,
                f"{len(one.participants)} ({sum(one.participants.values())})" if one.participants else "",
                _metrics(one),
                show.ago(one.created),
            )
            for one in versions
        ],
        empty="no version yet: the server makes the first one when it starts. See: fedbus up",
    )


@app.command("show")
def show_(
    version: Version = "latest",
    *,
    lineage: Annotated[bool, typer.Option("--lineage", help="From which version each was made.")] = False,
    task: TaskId = None,
    store: Store = "",
    json: show.AsJson = False,
) -> None:
    """Show all that is known of a version."""
    if lineage:
        _show_lineage(version, task, store, json=json)
        return
    found = _with_store(lambda models: _find(models, version), task, store)
    facts = _facts(found)
    if json:
        show.as_json(facts)
        return
    rows = {name: value for name, value in facts.items() if name not in ("participants", "metrics")}
    show.console().print(f"[bold]{found.task}[/] v{found.version}")
    show.table(("", ""), [(name, "" if value is None else value) for name, value in rows.items()], empty="")
    show.table(("client", "samples"), found.participants.items(), empty="no client took part in it")
    show.table(("metric", "value"), [(n, f"{v:.6g}") for n, v in found.metrics.items()], empty="no metrics")


@app.command()
def diff(
    old: Version,
    new: Version = "latest",
    *,
    task: TaskId = None,
    store: Store = "",
    json: show.AsJson = False,
) -> None:
    """Compare two versions: how far each tensor has moved, and each metric."""
    import asyncio

    from fedbus.learning import weights

    async def read(models: "ModelStore") -> list[tuple["Manifest", "Arrays"]]:
        found = [await _find(models, version) for version in (old, new)]
        paths = [await models.path_of(one.sha256) for one in found]
        return [
            (one, await asyncio.to_thread(weights.load, path)) for one, path in zip(found, paths, strict=True)
        ]

    (before, ours), (after, theirs) = _with_store(read, task, store)
    difference = weights.first_difference(ours, theirs)
    tensors = [_moved(name, ours[name], theirs[name]) for name in ours if _comparable(name, ours, theirs)]
    metrics: list[dict[str, Any]] = [
        {"metric": name, "old": before.metrics.get(name), "new": after.metrics.get(name)}
        for name in sorted(before.metrics.keys() | after.metrics.keys())
    ]
    if json:
        facts = {"old": before.version, "new": after.version, "architecture": difference}
        show.as_json(facts | {"tensors": tensors, "metrics": metrics})
        return
    if difference is not None:
        show.console().print(f"another architecture: in v{after.version}, {difference}")
    show.table(
        (
            "tensor",
            "shape",
            f"norm in v{before.version}",
            f"norm in v{after.version}",
            "moved by",
            "relative",
        ),
        [
            (
                one["tensor"],
                one["shape"],
                *(f"{one[name]:.4g}" for name in ("old_norm", "new_norm", "moved")),
                f"{one['relative']:.2%}",
            )
            for one in tensors
        ],
        empty="no tensor can be compared",
    )
    show.table(
        ("metric", f"v{before.version}", f"v{after.version}"),
        [(one["metric"], _figure(one["old"]), _figure(one["new"])) for one in metrics],
        empty="no metrics",
    )


@app.command()
def verify(
    versions: Annotated[list[str] | None, typer.Argument(help="Only these. [default: all]")] = None,
    *,
    task: TaskId = None,
    store: Store = "",
    json: show.AsJson = False,
) -> None:
    """Read every manifest and every artifact where it is kept, and see whether it is what it says."""

    async def read(models: "ModelStore") -> list[dict[str, Any]]:
        numbers = await models.numbers()
        latest = await models.latest()
        asked = [_number(one, latest.version if latest else 0) for one in versions or ()] or numbers
        return [await _verified(models, number, numbers) for number in asked]

    found = _with_store(read, task, store)
    bad = [one for one in found if one["complaint"]]
    if json:
        show.as_json(found)
    else:
        show.table(
            ("version", "sha256", "size", ""),
            [
                (
                    f"v{one['version']}",
                    (one["sha256"] or "")[:SHORT],
                    show.size(one["size_bytes"]) if one["size_bytes"] else "",
                    "damaged" if one["complaint"] else "retired" if one["retired"] else "sound",
                )
                for one in found
            ],
            empty="no version yet",
        )
    if bad:
        raise Failure("; ".join(f"v{one['version']}: {one['complaint']}" for one in bad))


@app.command()
def export(
    version: Version,
    path: Annotated[Path, typer.Argument(help="The file to write, a safetensors file.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Also over a file that is there.")] = False,
    task: TaskId = None,
    store: Store = "",
    json: show.AsJson = False,
) -> None:
    """Copy the weights of a version into a file."""
    if path.is_dir():
        raise Failure(f"{path} is a directory: name the file to write in it", Exit.USAGE)
    if path.exists() and not force:
        raise Failure(f"{path} is there already: name another file, or say --force", Exit.USAGE)

    async def read(models: "ModelStore") -> "Manifest":
        found = await _find(models, version)
        _copy(await models.path_of(found.sha256), path, found.sha256)
        return found

    found = _with_store(read, task, store)
    if json:
        show.as_json(_facts(found) | {"path": str(path.absolute())})
    else:
        show.console().print(f"v{found.version} is in {path}, {show.size(found.size_bytes)}, {found.sha256}")


# --- the repository ---------------------------------------------------------------------------


def _with_store(work: "Callable[[ModelStore], Awaitable[T]]", task: str | None, store: str) -> T:
    """What *work* finds in the repository of *task*."""
    from fedbus.app.session import now
    from fedbus.app.settings import Settings
    from fedbus.stores.models import open_store

    settings = Settings.from_environment()
    _take_key(settings.s3_dir / "credentials", given=bool(store or settings.given_store))
    url = store or settings.store_url

    async def run() -> T:
        return await work(open_store(url, await _the_task(url, task), patience_s=PATIENCE_S))

    return now(run())


def _take_key(credentials: Path, *, given: bool) -> None:
    """The key of the S3 that `fedbus up --store s3` runs here; whoever names a repository has one of their own."""
    import os

    from fedbus.app.embedded_s3 import CREDENTIALS_FILE

    if not given and credentials.is_file():
        os.environ.setdefault(CREDENTIALS_FILE, str(credentials))


async def _the_task(url: str, asked: str | None) -> str:
    """The task that was *asked* for, or the only one there is."""
    from fedbus.contracts.identifiers import task_id
    from fedbus.stores.models import tasks_in

    if asked is not None:
        return task_id(asked)
    known = await tasks_in(url, patience_s=PATIENCE_S)
    if len(known) == 1:
        return known[0]
    if not known:
        raise Failure(
            f"there is no model repository at {url}: a server makes one, see fedbus up; or name it with --store",
            Exit.NOT_FOUND,
        )
    raise Failure(f"several tasks are there: choose one of {', '.join(known)} with --task", Exit.USAGE)


async def _find(models: "ModelStore", version: str) -> "Manifest":
    if version != "latest":
        return await models.manifest(_number(version, 0))
    latest = await models.latest()
    if latest is None:
        raise Failure(
            "there is no version yet: the server makes the first one when it starts", Exit.NOT_FOUND
        )
    return latest


def _number(version: str, latest: int) -> int:
    """``3``, ``v3`` or ``latest``."""
    if version == "latest" and latest:
        return latest
    digits = version.removeprefix("v")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise Failure(f"{version!r} is no version: write 3, v3 or latest", Exit.USAGE)
    return int(digits)


async def _verified(models: "ModelStore", number: int, known: list[int]) -> dict[str, Any]:
    """What is wrong with a version; an empty complaint where nothing is."""
    from fedbus.stores.errors import StoreDamaged
    from fedbus.stores.models import ArtifactMissing, ArtifactRetired

    facts: dict[str, Any] = {"version": number, "sha256": None, "size_bytes": None}
    facts |= {"retired": False, "complaint": ""}
    try:
        manifest = await models.manifest(number)
        facts |= {"sha256": manifest.sha256, "size_bytes": manifest.size_bytes}
        await models.verify(manifest.sha256)
    except ArtifactRetired:
        facts["retired"] = True
    except (StoreDamaged, ArtifactMissing) as error:
        facts["complaint"] = str(error)
    else:
        if manifest.parent is not None and manifest.parent not in known:
            facts["complaint"] = f"its parent, version {manifest.parent}, is not there"
    return facts


def _copy(source: Path, target: Path, sha256: str) -> None:
    """A copy that is whole and right, or none."""
    import hashlib
    import shutil

    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        with part.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != sha256:
            raise Failure(f"what came out has digest {actual}, not {sha256}. See: fedbus model verify")
        part.replace(target)
    except OSError as error:
        raise Failure(f"cannot write {target}: {error.strerror or error}", Exit.MACHINE) from None
    finally:
        part.unlink(missing_ok=True)


# --- lineage ----------------------------------------------------------------------------------


def _show_lineage(version: str, task: str | None, store: str, *, json: bool) -> None:
    async def read(models: "ModelStore") -> tuple[list["Manifest"], "Manifest"]:
        return await models.versions(), await _find(models, version)

    versions, asked = _with_store(read, task, store)
    if json:
        show.as_json([_facts(one) | {"shown": one.version == asked.version} for one in versions])
    else:
        show.console().print(_tree(versions, asked))


def _tree(versions: list["Manifest"], asked: "Manifest") -> "Tree":
    """Each version under the one that it was made from."""
    from rich.tree import Tree

    root = Tree(f"[bold]{asked.task}[/]")
    branches: dict[int, Tree] = {}
    for one in versions:  # oldest first: a parent comes before its children
        name = f"[bold]v{one.version}[/]" if one.version == asked.version else f"v{one.version}"
        run = one.run or "the first model"
        line = f"{name}  {one.sha256[:SHORT]}  {run}  {_metrics(one)}  code {one.code_version[:SHORT]}"
        under = branches.get(one.parent or 0, root)
        branches[one.version] = under.add(line)
    return root


# --- figures ------------------------------------------------------------------------------------


def _facts(manifest: "Manifest") -> dict[str, Any]:
    return manifest.model_dump()


def _metrics(manifest: "Manifest") -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _comparable(name: str, ours: "Arrays", theirs: "Arrays") -> bool:
    return name in theirs and ours[name].shape == theirs[name].shape


def _moved(name: str, old: Any, new: Any) -> dict[str, Any]:
    """Euclidean norms, in double precision."""
    import numpy as np

    before, after = (np.asarray(one, dtype=np.float64).ravel() for one in (old, new))
    old_norm, moved = float(np.linalg.norm(before)), float(np.linalg.norm(after - before))
    return {
        "tensor": name,
        "shape": "×".join(map(str, old.shape)) or "scalar",
        "old_norm": old_norm,
        "new_norm": float(np.linalg.norm(after)),
        "moved": moved,
        "relative": moved / old_norm if old_norm else float(moved > 0),
    }
