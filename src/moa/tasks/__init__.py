"""The bundled task suite: eleven small generated tasks in two families, "math" and "commonsense".

Contract: `generate(name, split, n, seed)` gives `n` distinct rows in LLM-Adapters' form, a dict of
strings with `instruction`, `input` (always empty), `output` (the text to train on, which ends in
"The answer is ...") and `answer` (the gold answer). Train and test share no question content, for any
seeds. Rows are the same on every machine for the same arguments.

Limits: the tasks are in the image of the published sets (AddSub, AQuA, BoolQ, ARC, WinoGrande, ...)
but far simpler; they are sized for the embedded base model and compare with no published number.
"""

from __future__ import annotations

from moa.tasks.arithmetic import MATH_TASKS
from moa.tasks.bookings import BOOKINGS
from moa.tasks.commonsense import COMMONSENSE_TASKS
from moa.tasks.core import Task

__all__ = ["SUITE", "TASKS", "Task", "generate"]

SUITE: dict[str, Task] = {task.name: task for task in (*MATH_TASKS, *COMMONSENSE_TASKS)}
"""What ``tasks:all`` means."""

TASKS: dict[str, Task] = SUITE | {BOOKINGS.name: BOOKINGS}
"""Every task that ``tasks:NAME`` finds."""


def generate(name: str, split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of one bundled task.

    Args:
        name: a key of `TASKS`.
        split: "train" or "test".
        n: how many distinct rows, at least 0.
        seed: another seed draws other rows of the same split.

    Returns:
        `n` dicts with the string fields `instruction`, `input`, `output` and `answer`.

    Raises:
        ValueError: for an unknown task or split, a negative `n`, or more rows than the split has.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; valid tasks: {', '.join(TASKS)}")
    return TASKS[name].generate(split, n, seed)
