"""Cells, their names and digests, and the store of their results."""

from pathlib import Path

import pytest

from fedbus.simulation.experiments.cell_store import CellStore, CorruptCell
from fedbus.simulation.experiments.cells import Cell, CellRecord, matches
from fedbus.simulation.experiments.errors import ExperimentFailed, require_package
from fedbus.simulation.experiments.experiment import check_names, grid, seeds_from

CELL = Cell(factors={"mode": "sync", "delay_s": 3.0, "seed": 1}, function="a:b", settings={"lr": 0.1, "x": 1})


def record(cell: Cell) -> CellRecord:
    return CellRecord(
        digest=cell.digest,
        factors=cell.factors,
        settings=cell.settings,
        outcome={"loss": 1.5},
        wall_s=2,
        finished_at="2026-01-01T00:00:00+00:00",
    )


def test_the_name_has_all_levels() -> None:
    assert CELL.name == "mode=sync,delay_s=3,seed=1"
    odd = Cell(factors={"side": "a/../b c"}, function="a:b", settings={})
    assert odd.name == "side=a-..-b-c"


def test_the_digest_depends_on_function_and_settings_only() -> None:
    same = Cell(factors={"name": "another"}, function="a:b", settings={"x": 1, "lr": 0.1}, cost=7)
    assert same.digest == CELL.digest
    assert Cell(factors={}, function="a:b", settings={"lr": 0.2, "x": 1}).digest != CELL.digest
    assert Cell(factors={}, function="a:c", settings={"lr": 0.1, "x": 1}).digest != CELL.digest


def test_a_stored_result_is_loaded(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    assert store.load(CELL) is None
    store.save(CELL, record(CELL))
    assert store.load(CELL) == record(CELL)
    assert [file.name for file in (tmp_path / "cells").iterdir()] == ["mode=sync,delay_s=3,seed=1.json"]


def test_a_result_of_other_settings_is_not_used(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.save(CELL, record(CELL))
    assert store.load(CELL.model_copy(update={"settings": {"lr": 0.5}})) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"digest": "x"}', b"\xff\xfe"])
def test_a_corrupt_result_is_an_error_with_its_file(tmp_path: Path, content: bytes) -> None:
    store = CellStore(tmp_path)
    store.save(CELL, record(CELL))
    store.path_of(CELL).write_bytes(content)
    with pytest.raises(CorruptCell, match=r"seed=1\.json is not the result of a cell \("):
        store.load(CELL)


def test_a_directory_in_place_of_a_result_is_an_error(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.path_of(CELL).mkdir(parents=True)
    with pytest.raises(CorruptCell, match="cannot be read"):
        store.load(CELL)


def test_the_grid_has_all_combinations() -> None:
    rows = list(grid(mode=["sync", "async"], seed=[1, 2]))
    assert rows == [
        {"mode": "sync", "seed": 1},
        {"mode": "sync", "seed": 2},
        {"mode": "async", "seed": 1},
        {"mode": "async", "seed": 2},
    ]
    assert seeds_from(3, 2) == [3, 4]


def test_factors_match_their_levels() -> None:
    assert matches(CELL.factors, mode="sync", seed=1)
    assert not matches(CELL.factors, mode="sync", seed=2)
    assert not matches(CELL.factors, partition="iid")


def test_an_absent_package_is_an_error_with_its_extra() -> None:
    require_package("numpy", extra="simulation")
    with pytest.raises(ExperimentFailed, match=r"needs no_such_package, .* pip install 'fedbus\[torch\]'"):
        require_package("no_such_package", extra="torch")


def test_two_cells_with_one_name_are_an_error() -> None:
    with pytest.raises(ExperimentFailed, match="two cells have the name"):
        check_names([CELL, CELL.model_copy(update={"settings": {}})])
