"""Detection of a strategy that waits for more clients than are present.

Flower's strategies wait for clients by polling `Grid.get_node_ids` once a second, without a limit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fedbus.learning.library import NotEnoughClients

POLL_INTERVAL_S: Final = (0.5, 3.0)
"""Minimum and maximum pause between two calls of a thread that polls for nodes, in seconds."""
MAX_BLOCK_S: Final = 2.0
"""The limit for which one call blocks a polling thread, which may wait for something else as well."""


def not_enough_clients(present: Iterable[str], failed: dict[str, str], waited_s: float) -> NotEnoughClients:
    """Return the error of a strategy that waits for more clients than *present* for *waited_s* seconds."""
    present_text = ", ".join(sorted(present)) or "none"
    failed_text = ", ".join(f"{client} ({reason})" for client, reason in sorted(failed.items())) or "none"
    return NotEnoughClients(
        f"the strategy waited for more clients (limit {waited_s:g} s). "
        f"Present: {present_text}. Failed: {failed_text}. "
        "Lower the strategy's min_available_nodes, or start more clients"
    )


@dataclass
class NodePoller:
    """The polling state of one thread that calls `Grid.get_node_ids`. Times are in seconds of one clock."""

    since: float
    """Start of the wait."""
    last: float = float("-inf")
    """End of the last poll."""
    calls_made: int = -1
    """The Grid's count of other calls at the last poll."""

    def is_polling(self, now: float, calls_made: int) -> bool:
        """Return whether this call only continues to poll. If it does not, restart the wait."""
        shortest, longest = POLL_INTERVAL_S
        idle = calls_made == self.calls_made and now - self.last <= longest
        if not idle:
            self.since = now
        return idle and now - self.last >= shortest

    def record_answer(self, now: float, calls_made: int) -> None:
        """Record the end of a poll."""
        self.last, self.calls_made = now, calls_made
