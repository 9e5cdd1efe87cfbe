"""How a version stands: whether it is served, was served, or was kept back."""

from typing import Final

from fedbus.contracts.champion import Champion

CHAMPION: Final = "champion"
SERVED_BEFORE: Final = "served before"
NEVER_SERVED: Final = "not served"


def status_of(version: int, champion: Champion | None) -> str:
    """What has become of *version*; nothing where there is no champion yet.

    The champion remembers a bounded number of those before it: what was served longer ago counts as not served.
    """
    if champion is None:
        return ""
    if version == champion.version:
        return CHAMPION
    return SERVED_BEFORE if version in champion.before else NEVER_SERVED
