"""One line of `fedbus doctor`: what was looked at, how it is, what was found, and what to do."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from rich.text import Text


class Health(StrEnum):
    WELL = "well"
    REMARK = "remark"
    ILL = "ill"


MARKS: Final = {Health.WELL: ("✓", "green"), Health.REMARK: ("!", "yellow"), Health.ILL: ("✗", "bold red")}
SET_CLOCK: Final = "set the clock of this machine (timedatectl set-ntp true)"


@dataclass(frozen=True)
class Finding:
    what: str
    health: Health
    found: str
    advice: str = ""

    @property
    def is_ill(self) -> bool:
        return self.health is Health.ILL

    def line(self) -> Text:
        mark, style = MARKS[self.health]
        advice = f": {self.advice}" if self.advice else ""
        return Text.assemble((mark, style), f" {self.what:<16} ", self.found, (advice, "bold"))

    def as_facts(self) -> dict[str, Any]:
        return {**asdict(self), "health": str(self.health)}
