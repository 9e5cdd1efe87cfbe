"""One line of `fedbus doctor`: the check, its severity, its result, and advice."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from rich.text import Text


class Severity(StrEnum):
    OK = "well"
    WARNING = "remark"
    ERROR = "ill"


SEVERITY_MARKS: Final = {
    Severity.OK: ("✓", "green"),
    Severity.WARNING: ("!", "yellow"),
    Severity.ERROR: ("✗", "bold red"),
}
SET_CLOCK_ADVICE: Final = "set the clock of this machine (timedatectl set-ntp true)"


@dataclass(frozen=True)
class DoctorFinding:
    what: str
    health: Severity
    found: str
    advice: str = ""

    @property
    def is_error(self) -> bool:
        return self.health is Severity.ERROR

    def render(self) -> Text:
        mark, style = SEVERITY_MARKS[self.health]
        advice = f": {self.advice}" if self.advice else ""
        return Text.assemble((mark, style), f" {self.what:<16} ", self.found, (advice, "bold"))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "health": str(self.health)}
