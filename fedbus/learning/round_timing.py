"""Where a round's time went, client by client: in its ClientApp, on the way, or waiting for the others.

    |— message sent ——— the client trains ——— reply heard —————— the round ends |
    |        transfer_s + train_s                        | wait_s              |

All by the server's one clock but *train_s*, which the client tells; what a client needs beside that, mostly to
fetch the model and to give out its update, is the transfer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

PARTS: Final = ("train_s", "transfer_s", "wait_s")


@dataclass(frozen=True)
class ExchangeTiming:
    """One message of a round to a client, and its reply; at what second each was."""

    client: str
    asked: float
    replied: float
    train_s: float


def split_round_time(answers: Iterable[ExchangeTiming], ended: float) -> Mapping[str, Mapping[str, float]]:
    """Seconds by client and by `PARTS`, who took longest first; never less than nothing, whatever a client tells."""
    times: dict[str, dict[str, float]] = {}
    last: dict[str, float] = {}
    for one in answers:
        mine = times.setdefault(one.client, dict.fromkeys(PARTS, 0.0))
        away_s = max(0.0, one.replied - one.asked)
        train_s = min(max(0.0, one.train_s), away_s)
        mine["train_s"] += train_s
        mine["transfer_s"] += away_s - train_s
        last[one.client] = max(one.replied, last.get(one.client, one.replied))
    for client, replied in last.items():
        times[client]["wait_s"] = max(0.0, ended - replied)
    slowest = sorted(times, key=lambda client: -(times[client]["train_s"] + times[client]["transfer_s"]))
    return {client: times[client] for client in slowest}
