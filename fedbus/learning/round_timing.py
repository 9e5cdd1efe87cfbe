"""The time of a round, by client: in its ClientApp, in transfer, or waiting for the other clients.

    |— message sent ——— the client trains ——— reply received ——— the round ends |
    |        transfer_s + train_s                           | wait_s           |

The client measures *train_s*; the server's clock measures the rest. The remaining time until the reply, mostly
the download of the model and the upload of the update, counts as transfer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

PARTS: Final = ("train_s", "transfer_s", "wait_s")


@dataclass(frozen=True)
class ExchangeTiming:
    """The times of one message of a round and its reply, in seconds of the server's clock."""

    client: str
    sent_at: float
    replied_at: float
    train_s: float


def split_round_time(
    exchanges: Iterable[ExchangeTiming], round_end: float
) -> Mapping[str, Mapping[str, float]]:
    """Return the seconds of each client by `PARTS`, the slowest client first.

    No value is negative, whatever *train_s* a client reports.
    """
    times: dict[str, dict[str, float]] = {}
    last_replies: dict[str, float] = {}
    for exchange in exchanges:
        parts = times.setdefault(exchange.client, dict.fromkeys(PARTS, 0.0))
        elapsed_s = max(0.0, exchange.replied_at - exchange.sent_at)
        train_s = min(max(0.0, exchange.train_s), elapsed_s)
        parts["train_s"] += train_s
        parts["transfer_s"] += elapsed_s - train_s
        last_replies[exchange.client] = max(
            exchange.replied_at, last_replies.get(exchange.client, exchange.replied_at)
        )
    for client, replied_at in last_replies.items():
        times[client]["wait_s"] = max(0.0, round_end - replied_at)
    slowest = sorted(times, key=lambda client: -(times[client]["train_s"] + times[client]["transfer_s"]))
    return {client: times[client] for client in slowest}
