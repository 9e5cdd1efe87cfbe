"""Where a round's time went, client by client: training, on the way, or waiting for the others.

    |— message said ——— the client trains ——— reply said —————— the round ends |
    |        transfer_s + train_s                        | wait_s              |

From the times at which the log has the round's messages; what a client needs beside training, mostly to fetch
the model and to give out its update, is the transfer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Answered:
    """One message of a round to a client, and its reply."""

    client: str
    asked: datetime
    replied: datetime
    train_s: float


def split(answers: Collection[Answered], ended: datetime) -> Mapping[str, Mapping[str, float]]:
    """Seconds by client: ``train_s``, ``transfer_s``, ``wait_s``; never less than nothing, whatever clocks say."""
    times: dict[str, dict[str, float]] = {}
    for one in answers:
        mine = times.setdefault(one.client, {"train_s": 0.0, "transfer_s": 0.0, "wait_s": 0.0})
        away_s = max(0.0, (one.replied - one.asked).total_seconds())
        train_s = min(max(0.0, one.train_s), away_s)
        mine["train_s"] += train_s
        mine["transfer_s"] += away_s - train_s
    last = {one.client: one.replied for one in sorted(answers, key=lambda one: one.replied)}
    for client, replied in last.items():
        times[client]["wait_s"] = max(0.0, (ended - replied).total_seconds())
    return times
