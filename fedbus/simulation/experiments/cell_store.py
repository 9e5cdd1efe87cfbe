"""The result files of an experiment's cells: one JSON file for each, written whole or not at all."""

from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fedbus.common.filesystem import SHARED_MODE, atomic_write
from fedbus.simulation.experiments.cells import FORMAT, Cell, CellRecord

CELLS_DIRECTORY: Final = "cells"


class CorruptCell(Exception):
    """A result file cannot be read. The text names the file and the reason."""


class CellStore:
    """The directory ``cells`` of an experiment's output directory."""

    def __init__(self, output: Path) -> None:
        self.directory = output / CELLS_DIRECTORY

    def path_of(self, cell: Cell) -> Path:
        return self.directory / f"{cell.name}.json"

    def load(self, cell: Cell) -> CellRecord | None:
        """Return the result of *cell*; None if there is none, or it was computed with other settings.

        Raises:
            CorruptCell: the file is not a result.

        """
        path = self.path_of(cell)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CorruptCell(f"{path} cannot be read: {error.strerror or error}") from None
        try:
            record = CellRecord.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(one) for one in first["loc"])
            reason = f"{place}: {first['msg']}" if place else first["msg"]
            raise CorruptCell(f"{path} is not the result of a cell ({reason})") from None
        return record if record.format == FORMAT and record.digest == cell.digest else None

    def save(self, cell: Cell, record: CellRecord) -> None:
        """Write the result of *cell*."""
        self.directory.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path_of(cell), record.model_dump_json(indent=1), mode=SHARED_MODE, durable=False)
