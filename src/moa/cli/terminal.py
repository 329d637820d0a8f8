"""The terminal that verbs write to."""

from __future__ import annotations

from rich.console import Console


def terminal(*, stderr: bool = False) -> Console:
    """A console that shows text as it is: a path or a name may look like markup or like the code of an emoji."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
