"""What a study can measure, and how it is told."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """How a score is told.

    Attributes:
        title: of a table of its own.
        column: its name in the table of all methods.
        unit: of differences.
        factor: from a score to the unit.
        digits: after the point.
        sign: 1 if more is better, -1 if less is.
    """

    title: str
    column: str
    unit: str
    factor: float
    digits: int
    sign: int


METRICS = {
    "accuracy": Metric("accuracy, %", "accuracy %", "points", 100, 1, 1),
    "choice": Metric("most likely choice right, %", "choice %", "points", 100, 1, 1),
    "answer_loss": Metric("answer loss, nats", "answer loss", "nats", 1, 4, -1),
    "text_loss": Metric("loss on running text, nats", "text loss", "nats", 1, 4, -1),
}


def signed(value: float, unit: str) -> str:
    """A difference in the unit of a metric."""
    return f"{value:+.{next(metric.digits for metric in METRICS.values() if metric.unit == unit)}f}"
