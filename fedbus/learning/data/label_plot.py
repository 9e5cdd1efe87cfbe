"""A picture of the label distribution of partitions. Needs matplotlib."""

from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedbus.learning.data.errors import SIMULATION_EXTRA, DataPackageMissing
from fedbus.learning.data.images import Array
from fedbus.learning.data.label_distribution import LabelDistribution

MAX_BARS: Final = 50
"""With more clients, the picture has a column of shades for each client instead of a bar."""
MAX_LEGEND_CLASSES: Final = 20


def plot_label_distribution(distribution: LabelDistribution, path: Path, *, title: str) -> None:
    """Write a picture to *path*, whose suffix chooses the format: ``.png``, ``.svg`` or ``.pdf``.

    At most `MAX_BARS` clients are bars of samples, coloured by class. More clients are columns, ordered by their
    largest class, with a shade for the share of each class; their numbers of samples are drawn above.

    Raises:
        DataPackageMissing: matplotlib is not installed.

    """
    try:
        figures = import_module("matplotlib.figure")
        colormaps = import_module("matplotlib").colormaps
    except ImportError:
        raise DataPackageMissing(f"a picture needs matplotlib. Install it: {SIMULATION_EXTRA}") from None
    if len(distribution.counts) <= MAX_BARS:
        figure = figures.Figure(
            figsize=(9, 1.6 + 0.24 * max(6, len(distribution.counts))), layout="constrained"
        )
        _draw_bars(figure.add_subplot(), distribution, colormaps)
    else:
        figure = figures.Figure(figsize=(10, 6), layout="constrained")
        _draw_columns(figure, distribution)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _draw_bars(axes: Any, distribution: LabelDistribution, colormaps: Any) -> None:
    classes = len(distribution.class_names)
    colours = colormaps["tab10" if classes <= 10 else "tab20" if classes <= 20 else "turbo"]
    clients = np.arange(len(distribution.counts))
    start = np.zeros(len(clients), np.int64)
    for number, name in enumerate(distribution.class_names):
        counts = distribution.counts[:, number]
        colour = colours(number if classes <= MAX_LEGEND_CLASSES else number / (classes - 1))
        axes.barh(clients, counts, left=start, height=0.85, color=colour, label=name)
        start = start + counts
    axes.set_yticks(clients if len(clients) <= 25 else clients[::5])
    axes.invert_yaxis()
    axes.set_ylabel("client")
    axes.set_xlabel("samples")
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    if classes <= MAX_LEGEND_CLASSES:
        axes.figure.legend(
            *axes.get_legend_handles_labels(), loc="outside right upper", title="class", frameon=False
        )


def _draw_columns(figure: Any, distribution: LabelDistribution) -> None:
    order = order_by_largest_class(distribution)
    shares = distribution.counts[order] / distribution.sizes[order][:, None]
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    above.fill_between(
        np.arange(len(order) + 1), np.append(sizes := distribution.sizes[order], sizes[-1]), step="post"
    )
    above.set_ylabel("samples")
    above.set_ylim(bottom=0)
    above.spines[["top", "right"]].set_visible(False)
    image = below.imshow(
        shares.T,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        vmax=1,
        extent=(0, len(order), len(distribution.class_names) - 0.5, -0.5),
    )
    if len(distribution.class_names) <= MAX_LEGEND_CLASSES:
        below.set_yticks(range(len(distribution.class_names)), distribution.class_names)
    below.set_ylabel("class")
    below.set_xlabel(f"{len(order):,} clients, ordered by their largest class")
    figure.colorbar(image, ax=below, label="share of the client's samples", fraction=0.05)


def order_by_largest_class(distribution: LabelDistribution) -> Array:
    """Return the numbers of the clients, ordered by their largest class and its share."""
    shares = distribution.counts / distribution.sizes[:, None]
    return np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
