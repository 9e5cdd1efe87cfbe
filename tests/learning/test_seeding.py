"""Seeds of a run: the same numbers for the same seed, client, round and kind, in any process and any order."""

import random
import subprocess
import sys

import numpy as np
import pytest

from fedbus.learning.seeding import derive_seed, seed_client, seed_server


def draw() -> tuple[float, float]:
    return random.random(), float(np.random.random())


def draw_as(client: str, round_number: int, kind: str = "train", seed: int | None = 7) -> tuple[float, float]:
    seed_client(seed, client=client, round_number=round_number, kind=kind)
    return draw()


def test_a_client_draws_the_same_after_any_other() -> None:
    first = draw_as("c1", 1)
    draw_as("c2", 1)

    assert draw_as("c1", 1) == first


def test_each_seed_client_round_and_kind_draws_other_numbers() -> None:
    drawn = [
        draw_as("c1", 1),
        draw_as("c2", 1),
        draw_as("c1", 2),
        draw_as("c1", 1, "evaluate"),
        draw_as("c1", 1, seed=8),
    ]

    assert len(set(drawn)) == len(drawn)


def test_the_server_draws_other_numbers_after_a_recovery() -> None:
    seed_server(7)
    first = draw()
    seed_server(7, first_round=3)

    assert draw() != first


def test_without_a_seed_the_generators_continue() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = draw(), draw()
    random.seed(1)
    np.random.seed(1)
    first = draw()
    seed_server(None)

    assert (first, draw_as("c1", 1, seed=None)) == expected


def test_the_derivation_is_fixed() -> None:
    """A change of these numbers changes the results of all seeded runs."""
    assert derive_seed(7, "client-0000", 1, "train") == 3004438917447358643
    assert derive_seed(0, "server", 1) == 1036123854941154264


@pytest.mark.slow
def test_torch_is_seeded_when_the_app_imports_it() -> None:
    """In a process of its own, because torch may be loaded in this one."""
    pytest.importorskip("torch")
    code = (
        "import sys; from fedbus.learning.seeding import seed_server; seed_server(7);"
        "assert 'torch' not in sys.modules;"
        "import torch; print(torch.initial_seed())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert int(printed) == derive_seed(7, "server", 1)


def test_loaded_torch_is_seeded() -> None:
    torch = pytest.importorskip("torch")
    seed_client(7, client="c1", round_number=2, kind="train")

    assert torch.initial_seed() == derive_seed(7, "c1", 2, "train")


def test_seeding_does_not_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    seed_server(7)

    assert "torch" not in sys.modules
