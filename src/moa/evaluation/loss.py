"""Loss on answers: tells models apart where accuracy is still at chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from moa.data.tokens import Tokens, example_tokens
from moa.evaluation.generation import alike_under_spans, batches, context


def answer_loss(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, template: str = "alpaca", batch_size: int = 16
) -> float:
    """Mean cross-entropy, in nats per token, of the rows' outputs and their end-of-text token, given the prompts.

    Raises:
        ValueError: no rows, or a row longer than the model's context.
    """
    losses, counts = zip(*answer_losses(model, tokenizer, rows, template=template, batch_size=batch_size), strict=True)
    return sum(losses) / sum(counts)


def answer_losses(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, template: str = "alpaca", batch_size: int = 16
) -> list[tuple[float, int]]:
    """Of every row, the summed cross-entropy of its output and end-of-text token in nats, and the number of tokens.

    Raises:
        ValueError: no rows, or a row longer than the model's context.
    """
    if not rows:
        raise ValueError("nothing to evaluate: the data set has no rows")
    return losses_of(model, [example_tokens(tokenizer, row, template) for row in rows], batch_size)


def losses_of(model: Any, examples: Sequence[Tokens], batch_size: int) -> list[tuple[float, int]]:
    """Of every example, the summed cross-entropy of its answer's tokens in nats, and the number of these.

    Raises:
        ValueError: an example longer than the model's context.
    """
    whole = [example.prompt + example.answer for example in examples]
    longest = max(map(len, whole))
    if longest > context(model):
        raise ValueError(f"a row has {longest} tokens, but the model's context is {context(model)}")
    found: dict[int, tuple[float, int]] = {}
    for places in batches(range(len(whole)), whole, batch_size, alike_under_spans(model)):
        losses = _batch_losses(model, [whole[p] for p in places], [len(examples[p].prompt) for p in places])
        found |= zip(places, losses, strict=True)
    return [found[place] for place in range(len(whole))]


@torch.inference_mode()
def _batch_losses(model: Any, rows: list[list[int]], starts: list[int]) -> list[tuple[float, int]]:
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    labels = tokens.masked_fill(mask == 0, -100)
    for label, start in zip(labels, starts, strict=True):
        label[:start] = -100
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)).logits
    finally:
        model.train(was_training)
    wanted = labels[:, 1:].to(logits.device)
    losses = cross_entropy(logits[:, :-1].transpose(1, 2).float(), wanted, reduction="none").sum(-1)
    counts = (wanted != -100).sum(-1)
    return list(zip(losses.tolist(), counts.tolist(), strict=True))
