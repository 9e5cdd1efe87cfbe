"""A chart in the terminal, drawn with the eight dots of braille characters, with its range at the left.

0.9012 ⡇
       ⠘⢄
0.0790    ⠈⠑⠢⠤⣀⣀⣀
       1   2   3
"""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, log
from typing import Final

DOT_BITS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bits of a braille character, by row and column."""
BLANK: Final = 0x2800
LABEL_WIDTH: Final = 10
LOG_SCALE_RATIO: Final = 10


def render_chart(
    points: Sequence[tuple[float, float]],
    *,
    width: int,
    height: int,
    marks: Mapping[float, str] | None = None,
    logarithmic: bool = False,
) -> list[str]:
    """Draw *points* as lines of text.

    Args:
        points: x and y, in the order of x. Points that are not finite are omitted; without a point there are no lines.
        width: Columns, with the labels.
        height: Lines, without the marks.
        marks: Texts to write below the chart, by their x.
        logarithmic: Use a logarithmic y axis; each y must be above 0.

    """
    points = [point for point in points if all(map(isfinite, point))]
    if not points:
        return []
    left, right = points[0][0], points[-1][0]
    low, high = min(y for _, y in points), max(y for _, y in points)
    scale = log if logarithmic else float
    columns, rows = max(1, width - LABEL_WIDTH - 1), max(1, height)
    across, down = columns * 2 - 1, rows * 4 - 1

    def dot(point: tuple[float, float]) -> tuple[int, int]:
        x, y = point
        return round(_share(x, left, right) * across), round(
            (1 - _share(scale(y), scale(low), scale(high))) * down
        )

    cells = [[0] * columns for _ in range(rows)]
    dots = [dot(point) for point in points]
    for start, end in zip(dots, [*dots[1:], dots[-1]], strict=True):
        for x, y in _line(start, end):
            cells[y // 4][x // 2] |= DOT_BITS[y % 4][x % 2]
    labels = {rows - 1: low, 0: high}
    lines = [
        f"{_label(labels.get(row)):>{LABEL_WIDTH}} "
        f"{''.join(chr(BLANK + bits) for bits in cells[row]).rstrip(chr(BLANK))}"
        for row in range(rows)
    ]
    at = {round(_share(x, left, right) * (columns - 1)): text for x, text in (marks or {}).items()}
    return lines + ([" " * (LABEL_WIDTH + 1) + _render_marks(at, columns)] if at else [])


def needs_log_scale(heights: Sequence[float]) -> bool:
    """Return whether a linear scale would hide the small *heights*."""
    low, high = min(heights), max(heights)
    return low > 0 and high > LOG_SCALE_RATIO * low


def _share(value: float, low: float, high: float) -> float:
    return 0.0 if high == low else (value - low) / (high - low)


def _label(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _line(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the dots of a line from *start* to *end*."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    for step in range(steps + 1):
        yield (
            round(start[0] + (end[0] - start[0]) * step / steps),
            round(start[1] + (end[1] - start[1]) * step / steps),
        )


def _render_marks(at: Mapping[int, str], columns: int) -> str:
    """Write the marks in one line; a mark that would touch the mark before is omitted."""
    line = ""
    for column, text in sorted(at.items()):
        start = min(column, max(0, columns - len(text)))
        if start >= len(line) + bool(line):
            line = line.ljust(start) + text
    return line
