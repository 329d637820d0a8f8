"""Tables of accuracies for the terminal, and the bar that runs while they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from moa.evaluation.results import Outcome


def progress_bar(console: Console, *left: ProgressColumn) -> Progress:
    """A bar with counts and time left, which disappears when it is done; ``left`` says otherwise what is left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *(left or (TextColumn("left:"), TimeRemainingColumn())),
        console=console,
        transient=True,
    )


def accuracy_table(outcomes: Sequence[Outcome], means: dict[str, float]) -> Table:
    """Accuracy by set, with the mean of every family that has several.

    Args:
        outcomes: sets with their results.
        means: from `moa.evaluation.results.family_means`.
    """
    numbers = [Column(name, justify="right") for name in ("rows", "chance", "accuracy", "95 % interval")]
    table = Table("set", "family", *numbers, title="Accuracy (greedy)", title_justify="left")
    for family in [name for name in means if name != "all"]:
        members = [outcome for outcome in outcomes if outcome[0].family == family]
        for data, result in members:
            low, high = result.interval
            note = f" ({result.too_long} prompts too long)" if result.too_long else ""
            chance = "" if data.chance is None else f"{data.chance:.1%}"
            share = f"{result.accuracy:.1%}"
            table.add_row(data.name + note, family, str(len(result.items)), chance, share, f"{low:.1%} to {high:.1%}")
        if len(members) > 1:
            table.add_row(f"mean of {family}", "", "", "", Text(f"{means[family]:.1%}", "bold"), "", end_section=True)
    if len(outcomes) > 1:
        table.add_row("mean of all sets", "", "", "", Text(f"{means['all']:.1%}", "bold"), "")
    return table
