"""A matrix of numbers as a coloured picture in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.style import Style
from rich.table import Table
from rich.text import Text

# Dark blue over teal to yellow: even steps to the eye, and readable without seeing red and green apart.
_SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_WIDTH = 6


def heatmap(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str]) -> Table:
    """One coloured cell per value, the lowest dark and the highest bright; the numbers stand in the cells.

    Args:
        values: a number for every row and column.
        rows: names of the rows.
        columns: names of the columns.
    """
    everything = [value for row in values for value in row]
    low, high = min(everything), max(everything)
    widths = [max(len(name) + 2, _WIDTH) for name in columns]
    table = Table(box=None, padding=0, pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(Text(name), justify="center", no_wrap=True)
    for name, row in zip(rows, values, strict=True):
        cells = [_cell(value, low, high, width) for value, width in zip(row, widths, strict=True)]
        table.add_row(Text(f"{name} "), *cells)
    return table


def _cell(value: float, low: float, high: float, width: int) -> Text:
    red, green, blue = _colour((value - low) / (high - low) if high > low else 0.5)
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"
    return Text(f"{value:.2f}".center(width), Style(color=ink, bgcolor=f"rgb({red},{green},{blue})"))


def _colour(share: float) -> tuple[int, ...]:
    at = share * (len(_SCALE) - 1)
    left = min(int(at), len(_SCALE) - 2)
    return tuple(round(a + (b - a) * (at - left)) for a, b in zip(_SCALE[left], _SCALE[left + 1], strict=True))
