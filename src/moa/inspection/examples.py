"""Answers that the model writes itself, with the strongest expert of every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moa.adapters.telemetry import Place
from moa.data.templates import Prompt
from moa.data.tokens import prompt_text, prompt_tokens
from moa.decoding import generate_by
from moa.evaluation.generation import context, greedy
from moa.inspection.collect import RouterFacts, all_columns, decisions_of
from moa.inspection.results import Example, Strongest


def example(
    model: Any,
    tokenizer: Any,
    adapter: str,
    facts: Mapping[Place, RouterFacts],
    *,
    name: str,
    prompt: Prompt,
    max_new_tokens: int,
) -> Example | None:
    """Let the model answer ``prompt`` greedily; None if the prompt leaves no room or the answer is empty.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        adapter: whose routers.
        facts: from `moa.inspection.collect.routers_of`.
        name: of the data set.
        prompt: what the model reads.
        max_new_tokens: longest answer.
    """
    read = prompt_tokens(tokenizer, prompt)
    room = min(max_new_tokens, context(model) - len(read))
    if room < 1:
        return None
    tokens = torch.tensor([read], device=model.device)
    settings = greedy(model, tokenizer, room)
    written = generate_by(settings, model, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    text = [int(token) for token in written[0]]
    answer = text[len(read) :]
    if answer and answer[-1] in (settings.eos_token_id or []):
        answer.pop()
    if not answer:
        return None
    found = decisions_of(model, adapter, [read + answer])
    span = slice(len(read), len(read) + len(answer))
    return Example(
        set=name,
        prompt=prompt_text(tokenizer, prompt),
        tokens=[tokenizer.decode([token]) for token in answer],
        strongest=strongest_of(facts, {place: decided.gates[span] for place, decided in found.items()}),
    )


def strongest_of(facts: Mapping[Place, RouterFacts], gates: Mapping[Place, Tensor]) -> list[Strongest]:
    """The strongest column of (tokens, columns) gates: averaged over blocks for block routers, then router by router.

    A block that lacks an expert counts as not using it.
    """
    ordered = sorted(gates, key=lambda place: (place.block, place.site is not None))
    entries = [_strongest(place.block, place.site, facts[place].columns, gates[place]) for place in ordered]
    own = [place for place in ordered if place.site is None]
    if not own:
        return entries
    names = all_columns(facts[place].columns for place in own)
    mean = torch.zeros(len(gates[own[0]]), len(names))
    for place in own:
        mean[:, [names.index(name) for name in facts[place].columns]] += gates[place] / len(own)
    return [_strongest(None, None, names, mean), *entries]


def _strongest(block: int | None, site: str | None, columns: list[str], gates: Tensor) -> Strongest:
    values, places = gates.max(-1)
    names = [
        columns[place] if value > 0 else None for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]
    return Strongest(block, site, names, [float(value) for value in values])
