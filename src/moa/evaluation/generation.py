"""Greedy generation for many prompts, in batches of similar length.

Contract: prompts are tokenised by `moa.data.tokens`, padded on the left and never cut; the batches come longest first,
so that an estimate of the time left errs on the careful side and too large a batch fails at once. Under a span plan,
rows share a batch only if their spans are those that they have alone. Decoding is plain
greedy: sampling and penalties of the model's own generation settings are switched off. A text ends before the
end-of-text token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from moa.choices import check_range
from moa.data.templates import Prompt
from moa.data.tokens import end_of_turn, prompt_tokens
from moa.decoding import generate_by
from moa.spans.runtime.application import applied_to


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int
) -> Iterator[tuple[list[int], list[str | None]]]:
    """Continue every prompt.

    Args:
        model: a causal language model; in evaluation mode while its batches run.
        tokenizer: the model's tokenizer; need not have a padding token.
        prompts: texts or chats, see `moa.data.prompt_of`.
        max_new_tokens: most tokens per continuation.
        batch_size: prompts per batch.

    Yields:
        Places of a batch's prompts in ``prompts``, and their continuations; None for a prompt that leaves no room
        for ``max_new_tokens`` in the model's context.
    """
    check_range("max_new_tokens", max_new_tokens, low=1, whole=True)
    check_range("batch_size", batch_size, low=1, whole=True)
    ids = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    settings = greedy(model, tokenizer, max_new_tokens)
    room = context(model) - max_new_tokens
    too_long = [place for place, tokens in enumerate(ids) if len(tokens) > room]
    if too_long:
        yield too_long, [None] * len(too_long)
    fitting = [place for place, tokens in enumerate(ids) if len(tokens) <= room]
    was_training = model.training
    model.eval()
    try:
        for places in batches(fitting, ids, batch_size, alike_under_spans(model, max_new_tokens)):
            tokens, mask = pad_left([ids[place] for place in places], settings.pad_token_id)
            output = generate_by(
                settings, model, input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)
            )
            yield places, tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
    finally:
        model.train(was_training)


def batches(
    places: Sequence[int],
    ids: Sequence[Sequence[int]],
    batch_size: int,
    alike: Callable[[int, int], bool] = lambda own, longest: True,
) -> Iterator[list[int]]:
    """Places in batches of similar length, longest first; equal lengths keep their order.

    Args:
        places: to order.
        ids: tokens by place.
        batch_size: most places of a batch.
        alike: whether a row of so many tokens may share a batch with a longest one of so many.
    """
    batch: list[int] = []
    for place in sorted(places, key=lambda place: -len(ids[place])):
        if batch and (len(batch) == batch_size or not alike(len(ids[place]), len(ids[batch[0]]))):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def alike_under_spans(model: Any, new_tokens: int = 0) -> Callable[[int, int], bool]:
    """For `batches`: under a span plan rows whose spans follow from the longest one's length as from their own.

    Args:
        model: with or without a plan.
        new_tokens: to be generated; 0: texts are read as they are.
    """
    applied = applied_to(model)
    if applied is None:
        return lambda own, longest: True
    return lambda own, longest: applied.alike(own + new_tokens, longest + new_tokens, told=new_tokens > 0)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows as one (batch, longest) tensor with its attention mask."""
    longest = max(len(row) for row in rows)
    tokens = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens), torch.tensor(mask)


def context(model: Any) -> int:
    """Most tokens the model can read at once; without a limit of its own, a very large number."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**40)


def greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding up to end-of-text or the end of a turn; overrules the model's own generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *end_of_turn(tokenizer)} - {None}
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=min(ends, default=0) if pad is None else pad,
        eos_token_id=sorted(ends) or None,
    )
