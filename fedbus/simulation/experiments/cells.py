"""Cells: the smallest parts of an experiment that run on their own, and their results."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

FORMAT: Final = 1
"""The version of the result files."""

CellValue: TypeAlias = bool | int | float | str
Level: TypeAlias = int | float | str
CellOutcome: TypeAlias = dict[str, Any]
"""What a cell computes: JSON values."""


class Cell(BaseModel):
    """One combination of an experiment's factors."""

    model_config = ConfigDict(frozen=True)

    factors: dict[str, Level]
    """The level of each factor: ``{"mode": "sync", "delay_s": 3.0, "seed": 1}``."""
    function: str
    """The function that computes the outcome, as ``module:name``: ``(settings, report_progress) -> CellOutcome``."""
    settings: dict[str, Any]
    """Everything that the outcome depends on, as JSON values."""
    cost: float = Field(default=1.0, gt=0)
    """The expected computing time relative to other cells, for the estimate of the remaining time."""

    @property
    def name(self) -> str:
        """The levels of all factors, as the name of a file: ``mode=sync,delay_s=3,seed=1``."""
        parts = (f"{factor}={format_level(level)}" for factor, level in self.factors.items())
        return re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", ",".join(parts))[:200]

    @property
    def digest(self) -> str:
        """The SHA-256 of function and settings. A result with another digest belongs to another experiment."""
        content = json.dumps([FORMAT, self.function, self.settings], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


class CellRecord(BaseModel):
    """The result file of a finished cell."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    digest: str
    factors: dict[str, Level]
    settings: dict[str, Any]
    outcome: dict[str, Any]
    wall_s: float = Field(ge=0)
    """The time that the cell took on this machine, in seconds."""
    finished_at: str
    """ISO 8601, UTC."""


def format_level(level: Level) -> str:
    """Format a number without a trailing ``.0``."""
    return f"{level:g}" if isinstance(level, float) else str(level)


def matches(factors: Mapping[str, Level], **levels: Level) -> bool:
    """Return whether *factors* have these *levels*."""
    return all(factors.get(name) == level for name, level in levels.items())
