"""`fedbus model diff`: compare the tensors and metrics of two versions."""

import asyncio
from typing import Any

import numpy as np

from fedbus.app.cli.commands.model.repository import Store, TaskId, Version, find_manifest, run_with_store
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.app.terminal.progress_bar import progress_bar
from fedbus.contracts.model import Manifest
from fedbus.learning import weights
from fedbus.learning.weights import Arrays
from fedbus.stores.models.open import ModelStore


def diff(
    old: Version,
    new: Version = "latest",
    *,
    task: TaskId = None,
    store: Store = "",
    json: output.JsonOption = False,
) -> None:
    """Compare the tensors and metrics of two versions."""

    async def read(models: ModelStore) -> list[tuple[Manifest, Arrays]]:
        manifests = [await find_manifest(models, version) for version in (old, new)]
        paths = [await models.local_path(one.sha256) for one in manifests]
        return [
            (one, await asyncio.to_thread(weights.load, path))
            for one, path in zip(manifests, paths, strict=True)
        ]

    with progress_bar(f"comparing {old} and {new}"):
        (before, old_arrays), (after, new_arrays) = run_with_store(read, task, store)
        difference = weights.first_difference(old_arrays, new_arrays)
        tensors = [
            _tensor_change(name, old_arrays[name], new_arrays[name])
            for name in old_arrays
            if _is_comparable(name, old_arrays, new_arrays)
        ]
    metrics: list[dict[str, Any]] = [
        {"metric": name, "old": before.metrics.get(name), "new": after.metrics.get(name)}
        for name in sorted(before.metrics.keys() | after.metrics.keys())
    ]
    if json:
        facts = {"old": before.version, "new": after.version, "architecture": difference}
        print_json(facts | {"tensors": tensors, "metrics": metrics})
        return
    if difference is not None:
        output.console().print(f"different architecture: in v{after.version}, {difference}")
    output.print_table(
        (
            "tensor",
            "shape",
            f"norm in v{before.version}",
            f"norm in v{after.version}",
            "distance",
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
        empty="no comparable tensors",
    )
    output.print_table(
        ("metric", f"v{before.version}", f"v{after.version}"),
        [(one["metric"], _format_number(one["old"]), _format_number(one["new"])) for one in metrics],
        empty="no metrics",
    )


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _is_comparable(name: str, old_arrays: Arrays, new_arrays: Arrays) -> bool:
    return name in new_arrays and old_arrays[name].shape == new_arrays[name].shape


def _tensor_change(name: str, old: Any, new: Any) -> dict[str, Any]:
    """Return the Euclidean norms of a tensor and of its change, in double precision."""
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
