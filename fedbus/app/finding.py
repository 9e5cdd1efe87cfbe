"""One line of `fedbus doctor`: the check, its severity, its result, and advice."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from rich.text import Text


class Severity(StrEnum):
    WELL = "well"
    REMARK = "remark"
    ILL = "ill"


SEVERITY_MARKS: Final = {
    Severity.WELL: ("✓", "green"),
    Severity.REMARK: ("!", "yellow"),
    Severity.ILL: ("✗", "bold red"),
}
SET_CLOCK_ADVICE: Final = "set the clock of this machine (timedatectl set-ntp true)"


@dataclass(frozen=True)
class DoctorFinding:
    what: str
    health: Severity
    found: str
    advice: str = ""

    @property
    def is_ill(self) -> bool:
        return self.health is Severity.ILL

    def line(self) -> Text:
        mark, style = SEVERITY_MARKS[self.health]
        advice = f": {self.advice}" if self.advice else ""
        return Text.assemble((mark, style), f" {self.what:<16} ", self.found, (advice, "bold"))

    def as_facts(self) -> dict[str, Any]:
        return {**asdict(self), "health": str(self.health)}
