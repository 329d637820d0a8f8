"""How a trained mixture uses its experts: what its routers decide on prompts, per block, and which ones are dead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moa.adapters.members import mixtures_of
from moa.data import Prompt, prompt_tokens
from moa.inspection.collect import decisions_of, routers_of
from moa.inspection.statistics import statistics


def routing(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Look at every router while the model reads ``prompts``, one after the other.

    Returns:
        One dict per block: ``block``; by expert, ``gate`` (mean), ``active`` (share of tokens with a gate other than 0)
        and ``strongest`` (share of tokens on which it has the largest gate: 1 where a router has collapsed onto it);
        ``entropy`` of a token's gates, 1 if all are equal, of the block's routers on average; ``dead``, the names of
        its dead experts. Copies of an expert are ``q/0``, ``q/1`` and so on. Empty for a model without routers.
    """
    if not mixtures_of(model):
        return []
    adapter = model.active_adapter
    facts = routers_of(model, adapter)
    decided = decisions_of(model, adapter, [prompt_tokens(tokenizer, prompt) for prompt in prompts])
    blocks: dict[int, dict[str, Any]] = {}
    for place, found in decided.items():
        told = statistics(place, facts[place], found)
        new = {"block": place.block, "gate": {}, "active": {}, "strongest": {}, "entropy": [], "dead": []}
        block = blocks.setdefault(place.block, new)
        for key, values in (("gate", told.mean), ("active", told.active), ("strongest", told.strongest)):
            block[key] |= {name: round(value, 5) for name, value in zip(told.columns, values, strict=True)}
        block["dead"] += told.dead
        block["entropy"] += [] if told.entropy is None else [told.entropy]
    for block in blocks.values():
        block["entropy"] = round(sum(block["entropy"]) / len(block["entropy"]), 5) if block["entropy"] else None
    return [blocks[number] for number in sorted(blocks)]
