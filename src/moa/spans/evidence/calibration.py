"""Calibration items: long prompts that the dense model itself answers, supervised on these answers only.

What a plan must preserve is what the model does with its whole context, so the model's own greedy answer is the
target, not a human's (Mixture of Attention spans, arXiv 2406.14909, section 5). The middle of a text that is too long
is cut out *before* the model answers, so that every answer belongs to the very prompt it is measured on; the official
code cuts afterwards.

Contract: items are JSON lines, written one by one; a killed run goes on after the last whole line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from moa.spans.evidence.items import Item
from moa.spans.evidence.sources import Passage, Source
from moa.spans.identity import identity
from moa.spans.journal import Journal, read_lines

SHORTEST = 0.5  # of a length; shorter prompts say little about it


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
) -> dict[int, int]:
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
        How many items every length has; fewer than asked for when the source has no more texts that long.

    Raises:
        ValueError: a length without any item, no room for a prompt, or a file that was made with another model or
            other settings.
    """
    for length in lengths:
        if length < 2 * max_new_tokens:
            raise ValueError(f"length {length} leaves less room for the prompt than for {max_new_tokens} new tokens")
    made = {"source": vars(source), "items": items, "max_new_tokens": max_new_tokens, "lengths": sorted(lengths)}
    journal = Journal(path, identity(model) | made)
    for length, held_out in lengths.items():
        last = max((entry["passage"] for entry in journal.entries if entry["length"] == length), default=-1)
        passages = source.passages(length, items, lambda text: len(_ids(tokenizer, text)), held_out=held_out)
        for number, passage in enumerate(passages):
            if progress:
                progress(len(journal.entries), items * len(lengths))
            if _count(journal, length) == items:
                break
            if number > last and (item := _answered(model, tokenizer, passage, length, max_new_tokens)) is not None:
                journal.append({"length": length, "passage": number, **item.to_dict()})
        if not _count(journal, length):
            raise ValueError(
                f"{source.name} has no text of at least {int(SHORTEST * length)} tokens for length {length}"
            )
    return {length: _count(journal, length) for length in lengths}


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


def prompt_tokens(tokenizer: Any, passage: Passage, room: int) -> list[int]:
    """A prompt of at most ``room`` tokens; what is too long is cut out of the context's middle.

    Raises:
        ValueError: question and template alone need more.
    """
    prompt = _prompt(tokenizer, passage, passage.context)
    if len(prompt) <= room or passage.plain:
        return prompt
    context = _ids(tokenizer, passage.context)
    kept = room - len(_prompt(tokenizer, passage, ""))
    while kept > 0:
        head, tail = context[: kept - kept // 2], context[len(context) - kept // 2 :]
        prompt = _prompt(tokenizer, passage, tokenizer.decode(head) + tokenizer.decode(tail))
        if len(prompt) <= room:
            return prompt
        kept -= len(prompt) - room  # text cut in two places can take more tokens than before
    raise ValueError(f"the question and its template leave no room for a text within {room} tokens")


def _answered(model: Any, tokenizer: Any, passage: Passage, length: int, max_new_tokens: int) -> Item | None:
    """The passage with the model's answer; None if its prompt is too short or too long for the length."""
    most = min(passage.answer_tokens or max_new_tokens, max_new_tokens)
    prompt = prompt_tokens(tokenizer, passage, length - most)
    if not SHORTEST * length <= len(prompt) <= length - most:
        return None
    answer = greedy(model, tokenizer, prompt, most)
    return Item((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


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
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def _prompt(tokenizer: Any, passage: Passage, context: str) -> list[int]:
    if passage.plain:
        return list(tokenizer(context)["input_ids"])
    text = f"{context}\n\n{passage.question}"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        return _ids(tokenizer, tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    return list(tokenizer(f"{text}\n")["input_ids"])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _count(journal: Journal, length: int) -> int:
    return sum(entry["length"] == length for entry in journal.entries)
