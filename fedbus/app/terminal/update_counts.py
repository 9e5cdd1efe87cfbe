"""The updates of an aggregation as text."""

from fedbus.app.terminal.plain import pluralize
from fedbus.contracts.run import RoundResult


def describe_updates(result: RoundResult) -> list[str]:
    """Describe the updates of an aggregation: ``10 updates, 3 late``; nothing if the mode is ``sync``."""
    if not result.mode:
        return []
    counts = {"late": result.late_merged, "dropped": result.late_dropped}
    late = [f"{count} {name}" for name, count in counts.items() if count]
    return [", ".join([pluralize(result.updates, "update"), *late])]
