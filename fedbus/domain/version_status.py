"""The status of a model version: champion, served before, or never served."""

from typing import Final

from fedbus.contracts.champion import Champion
from fedbus.contracts.model import ModelRef

CHAMPION: Final = "champion"
SERVED_BEFORE: Final = "served before"
NEVER_SERVED: Final = "not served"


def status_of(model: ModelRef, champion: Champion | None) -> str:
    """Return the status of the version *model*; empty if there is no champion yet.

    The champion record holds a bounded number of previous versions: one that was served longer ago counts as
    not served. A model without tensors was champion, and no device served it.
    """
    if champion is None:
        return ""
    if model.version == champion.version:
        return CHAMPION
    return SERVED_BEFORE if model.version in champion.before and not model.is_empty else NEVER_SERVED
