"""A curve in the terminal: dots of braille, eight to a letter, with its range at the left.

0.9012 ⡇
       ⠘⢄
0.0790    ⠈⠑⠢⠤⣀⣀⣀
       1   2   3
"""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, log
from typing import Final

DOT_BITS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Of a letter of braille the bits, by row and column."""
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
    """*points*, x and y in the order of x, as lines of text; *marks* are written below at their x.

    What is not finite is left out; without any point there is no line. A *logarithmic* scale is for heights above 0.
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
    for begin, end in zip(dots, [*dots[1:], dots[-1]], strict=True):
        for x, y in _line(begin, end):
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
    """Whether on a plain scale nothing would be seen of the small ones."""
    low, high = min(heights), max(heights)
    return low > 0 and high > LOG_SCALE_RATIO * low


def _share(value: float, low: float, high: float) -> float:
    return 0.0 if high == low else (value - low) / (high - low)


def _label(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _line(begin: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The dots from one to the other."""
    steps = max(abs(end[0] - begin[0]), abs(end[1] - begin[1]), 1)
    for step in range(steps + 1):
        yield (
            round(begin[0] + (end[0] - begin[0]) * step / steps),
            round(begin[1] + (end[1] - begin[1]) * step / steps),
        )


def _render_marks(at: Mapping[int, str], columns: int) -> str:
    """The marks in one line; one that would touch the one before is left out."""
    line = ""
    for column, text in sorted(at.items()):
        begin = min(column, max(0, columns - len(text)))
        if begin >= len(line) + bool(line):
            line = line.ljust(begin) + text
    return line
