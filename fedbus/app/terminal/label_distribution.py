"""The label distribution of clients in the terminal: a bar for each client, whose parts are its classes.

    client  samples  classes  labels
    0           412        3  0000000011111113
    1           120        1  22222

A part is a colour with the character of its class, so that the bars can be read without colours. With many clients, the
bars are those of a sample from the smallest to the largest client, and histograms show all clients.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from rich.text import Text

from fedbus.learning.data.images import Array
from fedbus.learning.data.label_distribution import LabelDistribution

MAX_BARS: Final = 25
HISTOGRAM_BINS: Final = 40
CLASS_CHARACTERS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
MAX_CLASSES: Final = len(CLASS_CHARACTERS)
"""With more classes, neighbours are drawn as one."""
_COLOURS: Final = (
    *("dodger_blue2", "dark_orange", "green3", "red3", "medium_purple3"),
    *("gold3", "deep_pink3", "dark_cyan", "grey62", "yellow4"),
)
_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"

DistributionRow = tuple[str, str, str, Text]


def shown_clients(sizes: Array, limit: int = MAX_BARS) -> list[int]:
    """Return the clients to draw: all, or *limit* of them, evenly from the smallest to the largest."""
    if len(sizes) <= limit:
        return list(range(len(sizes)))
    order = np.argsort(sizes, kind="stable")
    return [int(order[place]) for place in np.linspace(0, len(sizes) - 1, limit).round().astype(int)]


def distribution_rows(
    distribution: LabelDistribution, clients: Sequence[int], *, width: int
) -> list[DistributionRow]:
    """Return client, samples, classes and bar of each of *clients*; the longest bar has *width* characters."""
    counts = _merge_classes(distribution.counts)
    largest = int(distribution.sizes[list(clients)].max())
    return [
        (
            str(client),
            f"{distribution.sizes[client]:,}",
            str(distribution.classes_per_client[client]),
            render_bar(counts[client], round_up(width * int(distribution.sizes[client]), largest)),
        )
        for client in clients
    ]


def render_bar(counts: Array, width: int) -> Text:
    """Return a bar of *width* characters, divided among the classes; each class with samples has one, if they fit."""
    bar = Text()
    for number, length in enumerate(divide_width(counts, width)):
        bar.append(CLASS_CHARACTERS[number] * length, style=_style(number))
    return bar


def divide_width(counts: Array, width: int) -> list[int]:
    """Divide *width* characters in proportion to *counts*; small counts come first to their one character."""
    present = np.flatnonzero(counts)
    if len(present) > width:
        present = present[np.argsort(-counts[present], kind="stable")[:width]]
    lengths = np.zeros(len(counts), np.int64)
    lengths[present] = 1
    shares = counts[present] / max(1, counts[present].sum()) * width
    while lengths.sum() < width and len(present):
        lengths[present[np.argmax(shares - lengths[present])]] += 1
    return [int(length) for length in lengths]


def render_legend(class_names: Sequence[str]) -> Text:
    """Return the character, the colour and the name of each class."""
    groups = np.array_split(np.arange(len(class_names)), min(MAX_CLASSES, len(class_names)))
    legend = Text()
    for number, group in enumerate(groups):
        first, last = class_names[group[0]], class_names[group[-1]]
        legend.append(CLASS_CHARACTERS[number], style=_style(number))
        legend.append(f" {first if len(group) == 1 else f'{first} to {last}'}  ")
    legend.rstrip()
    return legend


def has_legend(class_names: Sequence[str]) -> bool:
    """Return whether the names say more than the characters of the bars."""
    return list(class_names) != list(CLASS_CHARACTERS[: len(class_names)])


def render_histogram(numbers: Array) -> str:
    """Return a bar chart of how many clients have which number, from the least to the largest number."""
    least, most = int(numbers.min()), int(numbers.max())
    bins = min(HISTOGRAM_BINS, most - least + 1)
    counts, _ = np.histogram(numbers, bins=bins, range=(least, most + (bins == most - least + 1)))
    steps = np.ceil(counts / counts.max() * (len(_EIGHTHS) - 1)).astype(int)
    return "".join(_EIGHTHS[step] for step in steps)


def render_range(numbers: Array) -> str:
    """Return the least and the largest number and the median; with many clients, their histogram too."""
    least, most = int(numbers.min()), int(numbers.max())
    if least == most:
        return f"{least:,}"
    text = f"{least:,} to {most:,}, median {np.median(numbers):,.0f}"
    return f"{text}   {render_histogram(numbers)}" if len(numbers) > MAX_BARS else text


def round_up(part: int, whole: int) -> int:
    """Return *part* divided by *whole*, rounded up."""
    return -(-part // whole)


def _merge_classes(counts: Array) -> Array:
    """Add the columns of neighbouring classes, so that at most `MAX_CLASSES` remain."""
    groups = np.array_split(np.arange(counts.shape[1]), min(MAX_CLASSES, counts.shape[1]))
    return np.stack([counts[:, group].sum(axis=1) for group in groups], axis=1)


def _style(number: int) -> str:
    return f"black on {_COLOURS[number % len(_COLOURS)]}"
