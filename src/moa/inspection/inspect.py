"""The whole inspection of one loaded adapter on some data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from moa.adapters.config import MoAConfig
from moa.adapters.members import experts_of, mixtures_of
from moa.adapters.telemetry import Decisions, Place
from moa.choices import plain
from moa.data.templates import prompt_of
from moa.data.tokens import example_tokens
from moa.evaluation.generation import context
from moa.evaluation.models import Loaded
from moa.evaluation.sets import EvaluationSet
from moa.inspection.collect import RouterFacts, all_columns, decisions_of, joined, routers_of
from moa.inspection.examples import example
from moa.inspection.results import Example, Inspection, SetStatistics
from moa.inspection.similarity import similarity
from moa.inspection.statistics import statistics

Progress = Callable[[str, int], object]
Facts = Mapping[Place, RouterFacts]


def inspect_adapter(
    loaded: Loaded,
    sets: Sequence[EvaluationSet],
    *,
    adapter: str,
    examples: int = 1,
    progress: Progress = lambda name, steps: None,
) -> Inspection:
    """Watch an adapter read rows with their given answers, write some answers itself, and compare its experts.

    Args:
        loaded: model with the adapter, tokenizer and template.
        sets: what to read.
        adapter: how to call the adapter.
        examples: answers to show of each set.
        progress: called with what is going on and how many rows or examples were just finished.

    Raises:
        ValueError: not a Mixture of Adapters, or no row that fits into the model's context.
    """
    model, name = _mixture(loaded)
    config: MoAConfig = model.peft_config[name]
    facts = routers_of(model, name)
    texts, skipped = _texts(loaded, sets)
    decided = _decide(model, name, texts, progress) if facts else {}
    compared, tokens = similarity(model, name, _in_turns(list(texts.values())))
    return Inspection(
        adapter=adapter,
        base=loaded.base,
        template=loaded.template,
        blocks=model.config.get_text_config().num_hidden_layers,
        gating=plain(config.gating) if any(place.site is None for place in facts) else None,
        experts=all_columns(fact.columns for place, fact in facts.items() if place.site is None),
        bare=_bare(model, name),
        pooled=_pooled(facts, texts, skipped, decided),
        sets=[_set(data, facts, texts[data], skipped[data], decided.get(data, {})) for data in texts],
        examples=_examples(loaded, name, facts, sets, examples, progress) if facts else [],
        similarity=compared,
        compared_tokens=tokens,
        notes=_notes(config, facts),
    )


def _mixture(loaded: Loaded) -> tuple[Any, str]:
    model = loaded.model
    if not isinstance(model, PeftModel) or not isinstance(model.peft_config[model.active_adapter], MoAConfig):
        raise ValueError("nothing to inspect: the model has no Mixture of Adapters")
    return model, model.active_adapter


def _texts(loaded: Loaded, sets: Sequence[EvaluationSet]) -> tuple[dict[str, list[list[int]]], dict[str, int]]:
    """By set, the token ids of the rows that fit into the model's context, and how many do not."""
    limit = context(loaded.model)
    texts, skipped = {}, {}
    for data in sets:
        found = [_text(loaded, row) for row in data.rows]
        texts[data.name] = [text for text in found if 0 < len(text) <= limit]
        skipped[data.name] = len(found) - len(texts[data.name])
    if not any(texts.values()):
        rows = sum(skipped.values())
        raise ValueError(f"none of the {rows} rows fits into the model's context of {limit} tokens")
    return texts, skipped


def _text(loaded: Loaded, row: Mapping[str, Any]) -> list[int]:
    """Token ids of a row's prompt and its given answer; test rows may have a bare answer only."""
    read = example_tokens(loaded.tokenizer, {**row, "output": row["output"] or row["answer"]}, loaded.template)
    return read.prompt + read.answer


def _decide(
    model: Any, adapter: str, texts: Mapping[str, list[list[int]]], progress: Progress
) -> dict[str, dict[Place, Decisions]]:
    decided = {}
    for name, rows in texts.items():
        progress(name, 0)
        decided[name] = decisions_of(model, adapter, rows, lambda name=name: progress(name, 1))  # type: ignore[misc]
    return decided


def _set(
    name: str, facts: Facts, texts: list[list[int]], skipped: int, decided: Mapping[Place, Decisions]
) -> SetStatistics:
    found = [statistics(place, facts[place], decided[place]) for place in facts if place in decided]
    return SetStatistics(name, len(texts), sum(map(len, texts)), skipped, found)


def _pooled(
    facts: Facts,
    texts: Mapping[str, list[list[int]]],
    skipped: Mapping[str, int],
    decided: Mapping[str, Mapping[Place, Decisions]],
) -> SetStatistics:
    together = {
        place: joined([found[place] for found in decided.values() if place in found])
        for place in facts
        if any(place in found for found in decided.values())
    }
    rows = [row for rows in texts.values() for row in rows]
    return _set("all", facts, rows, sum(skipped.values()), together)


def _examples(
    loaded: Loaded, adapter: str, facts: Facts, sets: Sequence[EvaluationSet], number: int, progress: Progress
) -> list[Example]:
    found = []
    for data in sets:
        for row in data.rows[:number]:
            prompt = prompt_of(row, loaded.template)
            with torch.no_grad():
                made = example(
                    loaded.model,
                    loaded.tokenizer,
                    adapter,
                    facts,
                    name=data.name,
                    prompt=prompt,
                    max_new_tokens=data.max_new_tokens,
                )
            progress(f"answer: {data.name}", 1)
            found += [] if made is None else [made]
    return found


def _in_turns(sets: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """One text of each set after the other, so that a sample from the front has some of all."""
    longest = max(map(len, sets), default=0)
    return [texts[turn] for turn in range(longest) for texts in sets if turn < len(texts)]


def _bare(model: Any, adapter: str) -> list[int]:
    adapted = {mixture.index for mixture in mixtures_of(model) if experts_of(mixture, adapter)}
    return [block for block in range(model.config.get_text_config().num_hidden_layers) if block not in adapted]


def _notes(config: MoAConfig, facts: Facts) -> list[str]:
    notes = []
    if config.router is None:
        rest = "Only the copies inside them are routed." if facts else "There are no gates to show."
        notes.append(f"This adapter has no router over its experts: every expert is always fully on. {rest}")
    return notes
