"""Calibration items: long prompts that the dense model itself answers, supervised on these answers only.

What a plan must preserve is what the model does with its whole context, so the model's own greedy answer is the
target, not a human's (Mixture of Attention spans, arXiv 2406.14909, section 5). The middle of a text that is too long
is cut out *before* the model answers, so that every answer belongs to the very prompt it is measured on; the official
code cuts afterwards.

An item says how much its answers need the far context: its loss under a short window of `SHORT` of the length for all
heads, less the dense one. Where that is nothing, the item's influence is noise, and a search would follow it.

Contract: items are JSON lines, written one by one; a killed run goes on after the last whole line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from moa.decoding import generate_by
from moa.spans.evidence.conversation import conversation, prompt_tokens, token_ids
from moa.spans.evidence.items import Item, predicted
from moa.spans.evidence.sources import Passage, Source
from moa.spans.journal import Journal, read_lines
from moa.spans.model import ModelShape, identity
from moa.spans.plan import SpanPlan
from moa.spans.runtime.application import apply_spans

SHORTEST = 0.5  # of a length; shorter prompts say little about it
SHORT = 8  # a short window is the length by this, the first tokens included
FAR = 0.1  # nats per answer token that a short window must cost, or the far context was not needed


@dataclass(frozen=True)
class Signal:
    """What an item can tell a search.

    Attributes:
        loss: the dense model's response loss, nats per token.
        far: by how much a short window for all heads raises it.
        right: how many answers the dense model gave right; None where the right answer is not known.
        asked: how many it was asked for.
    """

    loss: float
    far: float
    right: int | None
    asked: int

    @property
    def carries(self) -> bool:
        """Whether the answers need the far context."""
        return self.far >= FAR


def calibrate(
    model: Any,
    tokenizer: Any,
    source: Source,
    lengths: Mapping[int, bool],
    path: Path,
    *,
    items: int = 50,
    max_new_tokens: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, list[Signal]]:
    """Answer long prompts and save them as items.

    Args:
        model: the dense model.
        tokenizer: its tokenizer; a chat template is used if it has one.
        source: where texts and questions come from.
        lengths: tokens of prompt and answer together, and whether that length's texts are held out for validation.
        path: the JSON lines file; if it exists, the run goes on from it.
        items: how many per length.
        max_new_tokens: most tokens of an answer.
        progress: called with finished and all items, at the start and after every item.

    Returns:
        What the items of every length can tell; fewer than asked for when the source has no more texts that long.

    Raises:
        ValueError: a length without any item or beyond the model's context, no room for a prompt, or a file that was
            made with another model or other settings.
    """
    context = ModelShape.of(model).context
    for length in lengths:
        if context is not None and length > context:
            raise ValueError(f"length {length} is more than the {context} tokens of the model's context")
        if length < 2 * max_new_tokens:
            raise ValueError(f"length {length} leaves less room for the prompt than for {max_new_tokens} new tokens")
    made = {"source": asdict(source), "items": items, "max_new_tokens": max_new_tokens, "lengths": sorted(lengths)}
    journal = Journal(path, identity(model) | made)
    for length, held_out in lengths.items():
        last = max((entry["passage"] for entry in journal.entries if entry["length"] == length), default=-1)
        passages = source.passages(length, items, lambda text: len(token_ids(tokenizer, text)), held_out=held_out)
        for number, passage in enumerate(passages):
            if progress:
                progress(len(journal.entries), items * len(lengths))
            if len(_signals(journal, length)) == items:
                break
            if number > last and (made_item := _item(model, tokenizer, passage, length, max_new_tokens)) is not None:
                item, signal = made_item
                journal.append({"length": length, "passage": number, **item.to_dict(), "signal": asdict(signal)})
        if not _signals(journal, length):
            raise ValueError(
                f"{source.source} has no text of at least {int(SHORTEST * length)} tokens for length {length}"
                + (" that the model answers a question about" if source.source.startswith("facts:") else "")
            )
    return {length: _signals(journal, length) for length in lengths}


def check_signals(signals: Mapping[int, list[Signal]], least: float) -> None:
    """Refuse items too few of which need the far context.

    Args:
        signals: of the items of every length.
        least: share of a length's items that must need it; 0 accepts all.

    Raises:
        ValueError: fewer do; names the length and the numbers.
    """
    for length, own in signals.items():
        carrying = sum(signal.carries for signal in own)
        if carrying < least * len(own):
            raise ValueError(
                f"only {carrying} of {len(own)} items of {length} tokens need their far context (a window of "
                f"{length // SHORT} tokens costs at least {FAR} nats per answer token), fewer than signal={least:g}: "
                "what a search would follow is noise. Ask about facts far back in the text (data.source='facts:'), "
                "or accept these items with signal=0"
            )


class _Answered(NamedTuple):
    """An item, the dense model's loss on it, and how many answers are right where that is known."""

    item: Item
    loss: float
    right: int | None


def _item(model: Any, tokenizer: Any, passage: Passage, length: int, max_new_tokens: int) -> tuple[Item, Signal] | None:
    """An item and what it tells; None if the text is too short or too long, or no known answer is right."""
    if len(passage.turns) > 1:
        found = _known(model, tokenizer, passage, length)
    else:
        found = _own(model, tokenizer, passage, length, max_new_tokens)
    if found is None:
        return None
    shape, block = ModelShape.of(model), max(length // (2 * SHORT), 1)
    short = SpanPlan.uniform(shape.layers, shape.kv_heads, 1 / SHORT, sink=block, block=block)
    with apply_spans(model, short):
        far = float(predicted(model, found.item)[0].mean()) - found.loss
    return found.item, Signal(found.loss, far, found.right, len(passage.turns))


def _known(model: Any, tokenizer: Any, passage: Passage, length: int) -> _Answered | None:
    """Several questions with known answers: those that the model gives right are its own greedy ones."""
    tokens, answers = conversation(tokenizer, passage)
    if not SHORTEST * length <= len(tokens) <= length:
        return None
    marked = {place for places in answers for place in places}
    losses, hits = predicted(model, Item(tuple(tokens), tuple(place in marked for place in range(len(tokens)))))
    loss_at = dict(zip(sorted(marked), losses.tolist(), strict=True))
    hit_at = dict(zip(sorted(marked), hits.tolist(), strict=True))
    right = [places for places in answers if all(hit_at[place] for place in places)]
    kept = {place for places in right for place in places}
    if not kept:
        return None
    item = Item(tuple(tokens), tuple(place in kept for place in range(len(tokens))))
    return _Answered(item, fmean(loss_at[place] for place in kept), len(right))


def _own(model: Any, tokenizer: Any, passage: Passage, length: int, max_new_tokens: int) -> _Answered | None:
    """One question, with the model's greedy answer."""
    most = min(passage.answer_tokens or max_new_tokens, max_new_tokens)
    prompt = prompt_tokens(tokenizer, passage, length - most)
    if not SHORTEST * length <= len(prompt) <= length - most:
        return None
    answer = greedy(model, tokenizer, prompt, most)
    known, right = passage.turns[0].answer, None
    if known is not None:
        said, known = tokenizer.decode(answer, skip_special_tokens=True).strip(), known.strip()
        right = int(said.startswith(known) and not said[len(known) : len(known) + 1].isalnum())
    item = Item((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))
    return _Answered(item, float(predicted(model, item)[0].mean()), right)


def load_items(path: Path, length: int) -> list[Item]:
    """The items of one length.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or no items of that length; names those there are.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no calibration items {str(path)!r}; `moa spans calibrate` makes them")
    entries = read_lines(path, torn=True)[1:]
    found = []
    for number, entry in enumerate(entries, start=2):
        try:
            if entry.get("length") == length:
                found.append(Item.from_dict(entry))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        there = sorted({entry["length"] for entry in entries if type(entry.get("length")) is int})
        raise ValueError(f"{path} has no items of length {length}, only of {there}")
    return found


def greedy(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The model's greedy continuation, its end-of-text token included."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
    )
    ids = torch.tensor([prompt], device=model.device)
    output = generate_by(config, model, input_ids=ids, attention_mask=torch.ones_like(ids))
    return output[0, len(prompt) :].tolist()


def _signals(journal: Journal, length: int) -> list[Signal]:
    return [Signal(**entry["signal"]) for entry in journal.entries if entry["length"] == length]
