"""The status of a model version: champion, served before, or never served."""

from typing import Final

from fedbus.contracts.champion import Champion

CHAMPION: Final = "champion"
SERVED_BEFORE: Final = "served before"
NEVER_SERVED: Final = "not served"


def status_of(version: int, champion: Champion | None) -> str:
    """Return the status of *version*; empty if there is no champion yet.

    The champion record holds a bounded number of previous versions: one that was served longer ago counts as
    not served.
    """
    if champion is None:
        return ""
    if version == champion.version:
        return CHAMPION
    return SERVED_BEFORE if version in champion.before else NEVER_SERVED
