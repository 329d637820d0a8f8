"""The last choice: which plan of the front answers best at a length that no search has seen.

Influence is a first-order estimate at the profiled lengths. Every candidate is therefore applied and its response loss
measured on held-out items of a longer text; the lowest wins, and of equal ones the smaller cache.

Contract: one loss per plan and item is on disk before the next is computed; a killed run goes on from there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from moa.spans.evidence.items import Item, response_loss
from moa.spans.identity import identity
from moa.spans.journal import Journal
from moa.spans.plan import SpanPlan
from moa.spans.runtime.application import apply_spans

NAMES = {0: "dense", 1: "uniform"}  # what is measured before the candidates


@dataclass(frozen=True)
class Verdict:
    """What validation found.

    Attributes:
        plan: the chosen plan, with ``searched["validation"]``.
        chosen: its place among the candidates.
        losses: mean response loss of every candidate, in nats.
        dense: that of the model without a plan.
        uniform: that of one span for all heads, at the density of the densest candidate.
    """

    plan: SpanPlan
    chosen: int
    losses: list[float]
    dense: float
    uniform: float


def validate(
    model: Any,
    plans: Sequence[SpanPlan],
    items: Sequence[Item],
    length: int,
    *,
    save_to: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Measure every plan's response loss and choose.

    Args:
        model: the model that the plans were searched for.
        plans: the candidates.
        items: held-out items of about ``length`` tokens.
        length: tokens; densities of equal plans are compared at it.
        save_to: a journal of losses, so that a killed run goes on.
        progress: called with finished and all forwards.

    Raises:
        ValueError: no plans or items, a loss that is not finite, or a journal of another run.
    """
    if not plans or not items:
        raise ValueError(f"validation needs plans and items; there are {len(plans)} plans and {len(items)} items")
    baseline = _uniform(plans, length)
    losses = _losses(model, [None, baseline, *plans], items, save_to, progress)
    dense, uniform, *means = [fmean(row) for row in losses]
    chosen = min(range(len(plans)), key=lambda place: (means[place], plans[place].kv_density(length)))
    plan = copy.deepcopy(plans[chosen])
    plan.searched["validation"] = {
        "length": length,
        "items": len(items),
        "dense_loss": dense,
        "loss": means[chosen],
        "kv_density": plan.kv_density(length),
        "chosen": chosen,
        "losses_of_all": means,
        "uniform_loss": uniform,
        "uniform_kv_density": baseline.kv_density(length),
    }
    return Verdict(plan, chosen, means, dense, uniform)


def _uniform(plans: Sequence[SpanPlan], length: int) -> SpanPlan:
    """The simplest rival: the same window everywhere (StreamingLLM), with at least the cache of every candidate."""
    densities = []
    for plan in plans:
        spans = plan.spans(length)
        layers = plan.searched.get("layers") or range(len(spans))
        densities.append(fmean(fmean(spans[layer]) for layer in layers) / length)
    one = plans[0]
    return SpanPlan.uniform(len(one.alphas), len(one.alphas[0]), max(densities), sink=one.sink, block=one.block)


def _losses(
    model: Any,
    plans: Sequence[SpanPlan | None],
    items: Sequence[Item],
    save_to: Path | None,
    progress: Callable[[int, int], None] | None,
) -> list[list[float]]:
    """One row per plan (None: dense), one loss per item."""
    journal = Journal(save_to, _settings(model, plans, items)) if save_to is not None else None
    done = [float(entry["loss"]) for entry in journal.entries] if journal else []
    total = len(plans) * len(items)
    for place in range(len(done), total):
        if progress:
            progress(place, total)
        plan, item = plans[place // len(items)], items[place % len(items)]
        with torch.inference_mode(), apply_spans(model, plan) if plan is not None else nullcontext():
            loss = float(response_loss(model, item))
        name = NAMES.get(place // len(items), str(place // len(items) - len(NAMES)))
        if not math.isfinite(loss):
            raise ValueError(f"plan {name} has a loss of {loss} on item {place % len(items)}")
        if journal:
            journal.append({"plan": name, "item": place % len(items), "loss": loss})
        done.append(loss)
    if progress:
        progress(total, total)
    return [done[start : start + len(items)] for start in range(0, total, len(items))]


def _settings(model: Any, plans: Sequence[SpanPlan | None], items: Sequence[Item]) -> dict[str, str]:
    def digest(content: object) -> str:
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    rules = [plan and [plan.alphas, plan.betas, plan.sink, plan.block] for plan in plans]
    return {**identity(model), "plans": digest(rules), "items": digest([item.to_dict() for item in items])}
