"""How well a model uses a long text: accuracy of `moa.tasks.long_context` and perplexity, by length.

Contract: answers are greedy, through ``model.generate`` with batches padded on the left, so that whatever is applied to
the model (a span plan, an adapter) is measured as it is used. An answer is right if the continuation begins with it and
does not run on into a longer word or number. Perplexity counts the second half of every window, so that each token that
counts has at least half a window before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from moa.data.tokens import prompt_tokens
from moa.evaluation.generation import context, generate
from moa.tasks import long_context
from moa.tasks.long_context import LongPrompt

__all__ = ["answers_right", "long_prompts", "perplexity", "retrieval"]


def long_prompts(tokenizer: Any, task: str, length: int, n: int, seed: int = 0) -> list[LongPrompt]:
    """Prompts of a task of at most ``length`` tokens of this tokenizer, the answers included."""

    @lru_cache(maxsize=100_000)
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return long_context.generate(task, length - _specials(tokenizer), n, count, seed)


def answers_right(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[LongPrompt],
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> list[bool]:
    """Per prompt, whether the model's greedy answer is right.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: from `long_prompts`.
        batch_size: prompts per batch.
        progress: called with the number of prompts just finished, after each batch.

    Raises:
        ValueError: a prompt that does not fit into the model's context.
    """
    wanted = [prompt.answer.strip() for prompt in prompts]
    new = max((len(tokenizer(p.answer, add_special_tokens=False)["input_ids"]) for p in prompts), default=1)
    right = [False] * len(prompts)
    texts = [prompt.prompt for prompt in prompts]
    for places, answers in generate(model, tokenizer, texts, max_new_tokens=new, batch_size=batch_size):
        for place, answer in zip(places, answers, strict=True):
            if answer is None:
                raise ValueError(f"prompt {place} leaves no room in the model's context of {context(model)} tokens")
            right[place] = _begins(answer.strip(), wanted[place])
        if progress is not None:
            progress(len(places))
    return right


def retrieval(
    model: Any, tokenizer: Any, task: str, length: int, n: int, *, seed: int = 0, batch_size: int = 8
) -> float:
    """Share of right answers, in [0, 1], on ``n`` prompts of a task at a length."""
    prompts = long_prompts(tokenizer, task, length, n, seed)
    if not prompts:
        raise ValueError("nothing to evaluate: n must be at least 1")
    return sum(answers_right(model, tokenizer, prompts, batch_size=batch_size)) / n


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, text: str, length: int, windows: int | None = None) -> float:
    """Perplexity per token of running text in windows of ``length`` tokens, on the second half of each.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        text: at least ``length`` tokens.
        length: tokens per window; windows do not overlap.
        windows: how many; None takes all there are.

    Raises:
        ValueError: the text is too short for as many windows, or a window for the model's context.
    """
    ids = torch.tensor(prompt_tokens(tokenizer, text))
    have = len(ids) // length
    if length > context(model) or have < (windows or 1):
        raise ValueError(
            f"{len(ids)} tokens make {have} windows of {length}; {windows or 1} asked, in a context of {context(model)}"
        )
    half, total, count = length // 2, 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for row in ids[: (windows or have) * length].view(-1, length):
            logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0, half - 1 : -1]
            total += float(cross_entropy(logits.float(), row[half:].to(logits.device), reduction="sum"))
            count += length - half
    finally:
        model.train(was_training)
    return math.exp(total / count)


def _begins(answer: str, wanted: str) -> bool:
    return answer.startswith(wanted) and not answer[len(wanted) : len(wanted) + 1].isalnum()


def _specials(tokenizer: Any) -> int:
    """How many tokens a prompt has besides those of its text."""
    return len(prompt_tokens(tokenizer, "a")) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
