"""How long a strategy may wait for more clients than there are: Flower waits by asking, once a second and for ever."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

POLL_INTERVAL_S: Final = (0.5, 3.0)
"""Who asks for the nodes again after such a pause, and sends nothing in between, waits for more of them."""
MAX_BLOCK_S: Final = 2.0
"""How long such a caller is held at a time: it may have reasons of its own to look elsewhere."""


class NotEnoughClients(RuntimeError):
    """The strategy waits for more clients than there are, and has waited long enough."""

    def __init__(self, present: Iterable[str], failed: dict[str, str], waited_s: float) -> None:
        there = ", ".join(sorted(present)) or "nobody"
        gone = "".join(f"; {client} is out ({reason})" for client, reason in sorted(failed.items()))
        super().__init__(
            f"the strategy waited {waited_s:g} s for more clients: there: {there}{gone}. "
            "Lower the strategy's min_available_nodes, or start more clients"
        )


@dataclass
class NodePoller:
    """A thread that asks who is there. Flower waits for nodes by asking once a second, for ever."""

    since: float
    """When it began to wait."""
    last: float = float("-inf")
    calls_made: int = -1

    def polls(self, now: float, calls_made: int) -> bool:
        """Whether it has done nothing but wait since it last asked. If not, its patience starts anew."""
        shortest, longest = POLL_INTERVAL_S
        idle = calls_made == self.calls_made and now - self.last <= longest
        if not idle:
            self.since = now
        return idle and now - self.last >= shortest

    def answered(self, now: float, calls_made: int) -> None:
        self.last, self.calls_made = now, calls_made
