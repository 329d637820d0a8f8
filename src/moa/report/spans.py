"""The page of a span plan: its picture, what it keeps, the plans it was chosen from, and the evidence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa.report.page import render, shade, write_page
from moa.spans.plan import SpanPlan


def write_report(path: str | Path, plan: SpanPlan, front: Sequence[SpanPlan] = (), length: int = 8192) -> Path:
    """Write a self-contained page.

    Args:
        path: the HTML file.
        plan: the plan; what is in its ``searched`` is shown, and may be empty.
        front: the plans it was chosen from, in their order.
        length: tokens at which spans are drawn.
    """
    lengths = sorted({length, *(int(key) for key in plan.searched.get("kv_density", {}))})
    body = render(
        "spans.html",
        model=plan.model or "not recorded",
        sink=plan.sink,
        length=length,
        heads=len(plan.alphas[0]),
        rows=_picture(plan, length),
        densities=[
            {"length": n, "kv": f"{plan.kv_density(n):.1%}", "attention": f"{plan.attention_density(n):.1%}"}
            for n in lengths
        ],
        front=_front(plan, [entry for entry in front if entry.searched.get("losses")]),
        verdict=_verdict(plan),
        evidence=json.dumps(plan.searched, indent=1),
    )
    return write_page(path, "Attention spans", body)


def _picture(plan: SpanPlan, length: int) -> list[dict[str, Any]]:
    rows = []
    for layer, (spans, rules) in enumerate(zip(plan.spans(length), plan.rules(), strict=True)):
        cells = [
            {"tokens": kept, "percent": f"{100 * kept / length:.0f}", "style": shade(kept / length)} for kept in spans
        ]
        said = ", ".join(f"{rule.alpha:g} + {rule.beta:g} N" for rule in dict.fromkeys(rules))
        rows.append({"layer": layer, "cells": cells, "rules": said})
    return rows


def _front(plan: SpanPlan, front: Sequence[SpanPlan]) -> dict[str, Any]:
    """The scatter of what plans drop at the shortest and the longest profiled length, and the table of all."""
    if not front:
        return {"points": [], "table": []}
    lengths = sorted(front[0].searched["losses"], key=int)
    validation = plan.searched.get("validation", {})
    losses = [[entry.searched["losses"][name] for name in lengths] for entry in front]
    x, y = [row[0] for row in losses], [row[-1] for row in losses]
    chosen = validation.get("chosen")
    return {
        "x": lengths[0],
        "y": lengths[-1],
        "lengths": lengths,
        "x_low": f"{min(x):.4g}",
        "x_high": f"{max(x):.4g}",
        "y_low": f"{min(y):.4g}",
        "y_high": f"{max(y):.4g}",
        "points": [
            {
                "x": round(80 + 520 * _share(here, x)),
                "y": round(290 - 250 * _share(there, y)),
                "name": f"{place:02}",
                "chosen": place == chosen,
                "title": f"plan {place:02}: {here:.6g} and {there:.6g}",
            }
            for place, (here, there) in enumerate(zip(x, y, strict=True))
        ],
        "table": [
            {
                "name": f"{place:02}" + (" (chosen)" if place == chosen else ""),
                "kind": entry.searched.get("kind", ""),
                "losses": [f"{loss:.4g}" for loss in row],
                "loss": _at(validation, "losses_of_all", place, "{:.4f}"),
                "accuracy": _at(validation, "accuracies_of_all", place, "{:.1%}"),
                "kv": _at(validation, "kv_densities_of_all", place, "{:.1%}"),
            }
            for place, (entry, row) in enumerate(zip(front, losses, strict=True))
        ],
    }


def _at(validation: dict[str, Any], key: str, place: int, form: str) -> str:
    values = validation.get(key)
    return "" if values is None else form.format(values[place])


def _share(value: float, among: Sequence[float]) -> float:
    width = max(among) - min(among)
    return 0.5 if width == 0 else (value - min(among)) / width


def _verdict(plan: SpanPlan) -> str:
    found = plan.searched.get("validation")
    if not found:
        return "This plan was not validated: its choice rests on first-order influence at the profiled lengths alone."
    return (
        f"Validated on {found['items']} held-out texts of about {found['length']} tokens, which no step of the search "
        f"had seen: response loss {found['loss']:.4f} under the plan, {found['dense_loss']:.4f} dense; "
        f"{found['accuracy']:.1%} of the answers stay the same ({found['dense_accuracy']:.1%} dense), with "
        f"{found['kv_density']:.1%} of the KV cache. One span for all heads, with {found['uniform_kv_density']:.1%} of "
        f"the cache, has {found['uniform_loss']:.4f} and {found['uniform_accuracy']:.1%}."
    )
