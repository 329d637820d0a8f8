"""The page of a span plan: its picture, what it keeps, the plans it was chosen from, and the evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.report.page import render, tinted, write_page
from moa.spans.plan import SpanPlan

MEASURED = {"losses_of_all": "{:.4f}", "accuracies_of_all": "{:.1%}", "kv_densities_of_all": "{:.1%}"}
"""What a validation says about every plan."""


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
        densities=[[n, f"{plan.kv_density(n):.1%}", f"{plan.attention_density(n):.1%}"] for n in lengths],
        front=_front(plan, {place: entry for place, entry in enumerate(front) if entry.searched.get("losses")}),
        verdict=_verdict(plan),
        evidence=json.dumps(plan.searched, indent=1),
    )
    return write_page(path, "Attention spans", body)


def _picture(plan: SpanPlan, length: int) -> list[list[Any]]:
    rows = []
    for layer, (spans, rules) in enumerate(zip(plan.spans(length), plan.rules(), strict=True)):
        shares = [(kept / length, f"layer {layer}, KV head {head}: {kept} tokens") for head, kept in enumerate(spans)]
        cells = [tinted(f"{100 * share:.0f}", share, title=title) for share, title in shares]
        rows.append([layer, *cells, ", ".join(f"{rule.alpha:g} + {rule.beta:g} N" for rule in dict.fromkeys(rules))])
    return rows


def _front(plan: SpanPlan, front: Mapping[int, SpanPlan]) -> dict[str, Any] | None:
    """What plans drop at the shortest and the longest profiled length, for the scatter, and the table of all.

    Args:
        plan: the chosen one.
        front: those with losses, by their places among all that were measured.
    """
    if not front:
        return None
    lengths = sorted(next(iter(front.values())).searched["losses"], key=int)
    validation = plan.searched.get("validation", {})
    chosen = validation.get("chosen")
    losses = [[entry.searched["losses"][name] for name in lengths] for entry in front.values()]
    return {
        "lengths": lengths,
        "chosen": chosen,
        "head": ["plan", "kind", *(f"dropped at {name}" for name in lengths), "loss", "answers kept", "KV cache"],
        "points": [(place, row[0], row[-1]) for place, row in zip(front, losses, strict=True)],
        "table": [
            [
                f"{place:02}" + (" (chosen)" if place == chosen else ""),
                entry.searched.get("kind", ""),
                *(f"{loss:.4g}" for loss in row),
                *(form.format(validation[key][place]) if key in validation else "" for key, form in MEASURED.items()),
            ]
            for (place, entry), row in zip(front.items(), losses, strict=True)
        ],
    }


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
