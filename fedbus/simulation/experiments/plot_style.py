"""Colours, markers and axes that all plots of the experiments share."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS: Final = ("#1f6feb", "#d1242f", "#1a7f37", "#bf8700", "#8250df", "#57606a")
"""Distinguishable on paper and on a screen, also in this order for people who do not see red and green."""
MARKERS: Final = ("o", "s", "^", "D", "v", "x")


def style_of(index: int) -> dict[str, Any]:
    """Return colour and marker of series number *index*."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def label_axes(axes: "Axes", *, x: str, y: str, title: str = "") -> None:
    """Label both axes; the labels have the unit."""
    axes.set(xlabel=x, ylabel=y)
    if title:
        axes.set_title(title, fontsize="medium")
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def grouped_bars(
    axes: "Axes",
    groups: Sequence[str],
    series: Iterable[tuple[str, Sequence[float], Sequence[float] | None]],
    *,
    count: int,
) -> None:
    """Draw bars side by side: for each of *count* series its label, its values by group, and their error bars."""
    width = 0.8 / count
    for index, (label, values, errors) in enumerate(series):
        at = [position - 0.4 + width * (index + 0.5) for position in range(len(groups))]
        axes.bar(
            at,
            values,
            width * 0.92,
            yerr=errors,
            label=label,
            color=COLORS[index % len(COLORS)],
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    axes.set_xticks(range(len(groups)), groups)
