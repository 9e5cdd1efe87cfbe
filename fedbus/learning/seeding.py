"""Seeds of the random number generators of a run, the same on the fleet and in simulation.

The seed of a run is one number (`RunPlan.seed`). Each process derives its own seeds from it:

    server side   (seed, "server", first round)          once, before the app is imported
    client side   (seed, client, round, kind)            before each message

A client's seed does not depend on the process that trains it or on what that process trained before, so the order of
the clients, the number of workers and a restart do not change a result. The derivation is part of the interface:
changing it changes the results of every seeded run. The decision is in docs/decisions/0030-seeds.md.

The generators are those of `random`, NumPy (the global one) and torch. fedbus does not import torch for this: if the
app does so later, torch is seeded at the end of its import.
"""

import hashlib
import importlib.util
import random
import sys
from collections.abc import Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np


def derive_seed(seed: int, *parts: str | int) -> int:
    """Return the 63-bit seed for the purpose that *parts* name: the start of a SHA-256 digest."""
    name = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def seed_server(seed: int | None, *, first_round: int = 1) -> None:
    """Seed the generators for a run's server side. Call this before the app is imported; None: do nothing."""
    if seed is not None:
        _seed_generators(derive_seed(seed, "server", first_round))


def seed_client(seed: int | None, *, client: str, round_number: int | None, kind: str) -> None:
    """Seed the generators for one message to *client*. Call this before each message; None: do nothing."""
    if seed is not None:
        _seed_generators(derive_seed(seed, client, round_number or 0, kind))


def _seed_generators(number: int) -> None:
    random.seed(number)
    np.random.seed(number % 2**32)  # apps use the global generator
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        _seed_torch(torch, number)
    else:
        _TORCH_SEEDER.watch(number)


def _seed_torch(torch: Any, number: int) -> None:
    """Seed the generators of torch. Without an accelerator there is one, and `torch.manual_seed` is 50 times slower."""
    if _has_accelerator():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@cache
def _has_accelerator() -> bool:
    accelerator = getattr(sys.modules["torch"], "accelerator", None)
    return accelerator is None or bool(accelerator.is_available())


class _TorchSeeder(MetaPathFinder):
    """Seeds torch when it is imported. Without this, torch starts from a random seed of the operating system."""

    def __init__(self) -> None:
        self._number = 0

    def watch(self, number: int) -> None:
        """Seed torch with *number* at the end of its import."""
        self._number = number
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the interface of importlib
        target: ModuleType | None = None,  # noqa: ARG002 - the interface of importlib
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_seed(module: ModuleType) -> None:
                execute(module)
                module.manual_seed(self._number)

            spec.loader.exec_module = execute_and_seed  # type: ignore[method-assign]
        return spec


_TORCH_SEEDER = _TorchSeeder()
