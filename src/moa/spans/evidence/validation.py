"""The last choice: which plan answers best at a length that no search has seen.

Influence is a first-order estimate at the profiled lengths. Every candidate, of whatever kind, is therefore applied and
its response loss measured on held-out items of a longer text; the lowest wins, and of equal ones the smaller cache.
How many answers stay the dense model's own is told beside it: the loss is steadier, the share says what it means.

Contract: one result per plan and item is on disk before the next is computed; a killed run goes on from there.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from moa.spans.evidence.items import Item, answers_kept, predicted
from moa.spans.journal import Journal
from moa.spans.model import identity
from moa.spans.plan import SpanPlan
from moa.spans.runtime.application import apply_spans

NAMES = {0: "dense", 1: "uniform"}  # what is measured before the candidates
UNIFORM = "uniform"


@dataclass(frozen=True)
class Measured:
    """One plan on the held-out items.

    Attributes:
        loss: mean response loss, in nats.
        accuracy: share of answers all of whose tokens are still the most likely ones.
        kv_density: kept share of the bytes of the KV cache.
    """

    loss: float
    accuracy: float
    kv_density: float


@dataclass(frozen=True)
class Verdict:
    """What validation found.

    Attributes:
        plan: the chosen plan, with ``searched["validation"]``.
        chosen: its place among the candidates.
        measured: every candidate.
        dense: the model without a plan.
        uniform: one span for all heads; the candidate of that kind, else at the density of the densest candidate.
    """

    plan: SpanPlan
    chosen: int
    measured: list[Measured]
    dense: Measured
    uniform: Measured

    @property
    def losses(self) -> list[float]:
        """Mean response loss of every candidate, in nats."""
        return [one.loss for one in self.measured]


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
    kinds = [plan.searched.get("kind") for plan in plans]
    baseline = plans[kinds.index(UNIFORM)] if UNIFORM in kinds else _uniform(plans, length)
    dense, uniform, *measured = _measured(model, [None, baseline, *plans], items, length, save_to, progress)
    chosen = min(range(len(plans)), key=lambda place: (measured[place].loss, measured[place].kv_density))
    plan, best = copy.deepcopy(plans[chosen]), measured[chosen]
    plan.searched["validation"] = {
        "length": length,
        "items": len(items),
        "dense_loss": dense.loss,
        "dense_accuracy": dense.accuracy,
        "loss": best.loss,
        "accuracy": best.accuracy,
        "kv_density": best.kv_density,
        "chosen": chosen,
        "kinds": kinds,
        "losses_of_all": [one.loss for one in measured],
        "accuracies_of_all": [one.accuracy for one in measured],
        "kv_densities_of_all": [one.kv_density for one in measured],
        "uniform_loss": uniform.loss,
        "uniform_accuracy": uniform.accuracy,
        "uniform_kv_density": uniform.kv_density,
    }
    return Verdict(plan, chosen, measured, dense, uniform)


def _uniform(plans: Sequence[SpanPlan], length: int) -> SpanPlan:
    """The simplest rival: the same window everywhere (StreamingLLM), with at least the cache of every candidate."""
    densities = []
    for plan in plans:
        spans = plan.spans(length)
        layers = plan.searched.get("layers") or range(len(spans))
        densities.append(fmean(fmean(spans[layer]) for layer in layers) / length)
    one = plans[0]
    return SpanPlan.uniform(len(one.alphas), len(one.alphas[0]), max(densities), sink=one.sink, block=one.block)


def _measured(
    model: Any,
    plans: Sequence[SpanPlan | None],
    items: Sequence[Item],
    length: int,
    save_to: Path | None,
    progress: Callable[[int, int], None] | None,
) -> list[Measured]:
    """Every plan (None: dense) on all items. Plans of equal rules, and the same plan twice, are measured once."""
    journal = Journal(save_to, _settings(model, plans, items)) if save_to is not None else None
    done: list[dict[str, Any]] = list(journal.entries) if journal else []
    total = len(plans) * len(items)
    for place in range(len(done), total):
        if progress:
            progress(place, total)
        row, column = divmod(place, len(items))
        first = next(number for number, plan in enumerate(plans) if plan is plans[row])
        entry = {"plan": NAMES.get(row, str(row - len(NAMES))), "item": column}
        if first < row:
            entry = {**done[first * len(items) + column], **entry}
        else:
            entry |= _on_item(model, plans[row], items[column], entry)
        if journal:
            journal.append(entry)
        done.append(entry)
    if progress:
        progress(total, total)
    rows = [done[start : start + len(items)] for start in range(0, total, len(items))]
    return [
        Measured(
            fmean(float(entry["loss"]) for entry in row),
            sum(entry["kept"] for entry in row) / sum(entry["answers"] for entry in row),
            1.0 if plan is None else plan.kv_share(model, length),
        )
        for plan, row in zip(plans, rows, strict=True)
    ]


def _on_item(model: Any, plan: SpanPlan | None, item: Item, entry: dict[str, Any]) -> dict[str, Any]:
    with torch.inference_mode(), apply_spans(model, plan) if plan is not None else nullcontext():
        losses, hits = predicted(model, item)
    if not losses.isfinite().all():
        raise ValueError(f"plan {entry['plan']} has a loss of {float(losses.mean())} on item {entry['item']}")
    kept = answers_kept(item, hits)
    return {"loss": float(losses.mean()), "kept": sum(kept), "answers": len(kept)}


def _settings(model: Any, plans: Sequence[SpanPlan | None], items: Sequence[Item]) -> dict[str, str]:
    def digest(content: object) -> str:
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    rules = [plan and [plan.alphas, plan.betas, plan.sink, plan.block] for plan in plans]
    return {**identity(model), "plans": digest(rules), "items": digest([item.to_dict() for item in items])}
