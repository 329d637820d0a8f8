"""How a trained mixture uses its experts: gates averaged over prompts, per block, and the experts that are dead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moa.adapters.members import mixtures_of
from moa.adapters.telemetry import gate_values, is_dead
from moa.data import Prompt, prompt_tokens


def routing(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Look at every block's router while the model reads ``prompts``, one after the other.

    Returns:
        One dict per block: ``block``; ``gate`` and ``active``, by expert the mean gate and the share of tokens with a
        gate other than 0; ``dead``, the names of its dead experts. Copies of an expert are ``q/0``, ``q/1`` and so on.
        Empty for a model without routers.
    """
    if not mixtures_of(model):
        return []
    seen: dict[int, dict[str, list[Tensor]]] = {}
    was_training = model.training
    model.eval()
    with gate_values(model) as record, torch.no_grad():
        for prompt in prompts:
            record.clear()
            model(input_ids=torch.tensor([prompt_tokens(tokenizer, prompt)], device=model.device))
            for place, decided in record.decisions():
                found = seen.setdefault(place.block, {})
                for name, gates in zip(record.columns_of(place), decided.gates[0].unbind(-1), strict=True):
                    found.setdefault(name, []).append(gates.float().cpu())
    model.train(was_training)
    return [_summary(block, seen[block]) for block in sorted(seen)]


def _summary(block: int, gates: dict[str, list[Tensor]]) -> dict[str, Any]:
    joined = {name: torch.cat(columns) for name, columns in gates.items()}
    gate = {name: round(float(values.mean()), 5) for name, values in joined.items()}
    active = {name: round(float((values != 0).float().mean()), 5) for name, values in joined.items()}
    dead = [name for name in joined if is_dead(gate[name], active[name])]
    return {"block": block, "gate": gate, "active": active, "dead": dead}


def snapshot_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put a checkpoint's adapter into a model that has the same adapter."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, tensors)  # type: ignore[no-untyped-call]
