"""Where adapters and attention spans meet: an adapter is trained, and later used, under a span plan.

The plan is copied into the adapter's folder as ``spans.json``, so that whoever loads the adapter with MoA's commands
gets the attention that it has learned with.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from moa.spans import SpanPlan, apply_spans
from moa.training.beside import beside

FILE_NAME = "spans.json"


def plan_from(path: str | None) -> SpanPlan | None:
    """The plan of a recipe or flag, None if it names none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a plan.
    """
    return None if path is None else SpanPlan.load(Path(path).expanduser())


def under(model: Any, plan: SpanPlan | None) -> AbstractContextManager[Any]:
    """The model attends by ``plan`` inside; nothing changes without one.

    Raises:
        ValueError: the plan does not fit the model.
    """
    return nullcontext() if plan is None else apply_spans(model, plan)


def plan_beside(adapter: str | None) -> SpanPlan | None:
    """The plan that an adapter was trained under, None if it was none."""
    path = beside(adapter, FILE_NAME) if adapter else None
    return SpanPlan.load(path) if path else None


def plan_for_use(adapter: str | None, spans: str | None) -> SpanPlan | None:
    """What ``--spans`` means: a plan's path, ``none`` for dense attention, or nothing for the adapter's own plan."""
    if spans is None:
        return plan_beside(adapter)
    return None if spans == "none" else plan_from(spans)
