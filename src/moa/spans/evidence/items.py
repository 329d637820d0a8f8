"""One supervised text: tokens, and which of them the model answers for.

An item's loss is the mean cross-entropy, in nats, over its response tokens only, each predicted from what stands before
it. Influence is measured on this loss, and plans are compared by it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Item:
    """A text with its supervised part.

    Attributes:
        tokens: token ids, beginning of the prompt first.
        response: one bool per token; True where the loss looks. The first token predicts and is never predicted.

    Raises:
        ValueError: lengths that differ, or nothing to supervise.
    """

    tokens: tuple[int, ...]
    response: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.response):
            raise ValueError(f"an item has {len(self.tokens)} tokens but marks for {len(self.response)}")
        if not any(self.response[1:]):
            raise ValueError(f"an item of {len(self.tokens)} tokens has no response token to supervise")

    def to_dict(self) -> dict[str, Any]:
        """Tokens, and response as [start, end) ranges; `from_dict` reads it."""
        edges = [0, *itertools.accumulate(len(list(run)) for _, run in itertools.groupby(self.response))]
        ranges = [[start, end] for start, end in itertools.pairwise(edges) if self.response[start]]
        return {"tokens": list(self.tokens), "response": ranges}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Item:
        """Raises ValueError for fields that `to_dict` never writes."""
        tokens, ranges = fields.get("tokens"), fields.get("response")
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise ValueError("an item's 'tokens' must be a list of token ids")
        marks = [False] * len(tokens)
        for pair in ranges if isinstance(ranges, list) else [None]:
            if not isinstance(pair, list) or len(pair) != 2 or not all(type(edge) is int for edge in pair):
                raise ValueError("an item's 'response' must be a list of [start, end) pairs")
            start, end = pair
            if not 0 <= start < end <= len(tokens):
                raise ValueError(f"an item's response {pair} lies outside of its {len(tokens)} tokens")
            marks[start:end] = [True] * (end - start)
        return cls(tuple(tokens), tuple(marks))


def response_loss(model: Any, item: Item) -> Tensor:
    """Mean cross-entropy over the response tokens of one item: a float32 scalar, differentiable."""
    return cross_entropy(*response_logits(model, item))


def log_odds(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean log-odds against the wanted tokens, ``log((1 - p) / p)`` in nats: a scalar, differentiable.

    Its gradient is that of the cross-entropy over ``1 - p``. An answer that is certain moves the cross-entropy of its
    tokens by nearly nothing, whatever is taken away to first order, so that the few uncertain tokens would decide alone
    what far context is worth; log-odds count all of them alike.
    """
    own = logits.gather(-1, wanted[:, None])
    others = logits.scatter(-1, wanted[:, None], float("-inf")).logsumexp(-1, keepdim=True)
    return (others - own).mean()


def response_logits(model: Any, item: Item) -> tuple[Tensor, Tensor]:
    """Float32 logits (tokens, vocabulary) that predict the response tokens, and these tokens.

    Only the logits that the loss needs are computed where the model's forward can choose them.
    """
    ids = torch.tensor([item.tokens], device=model.device)
    wanted = torch.tensor(item.response[1:], device=model.device).nonzero()[:, 0]
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits[0]
    else:
        logits = model(input_ids=ids, use_cache=False).logits[0, wanted]
    return logits.float(), ids[0, wanted + 1].to(logits.device)


@torch.no_grad()
def predicted(model: Any, item: Item) -> tuple[Tensor, Tensor]:
    """How the model does on every response token, read with those before it.

    Returns:
        Losses in nats (tokens,) float32, and whether the token is the most likely one (tokens,) bool; both on the CPU.
    """
    logits, wanted = response_logits(model, item)
    return cross_entropy(logits, wanted, reduction="none").cpu(), (logits.argmax(-1) == wanted).cpu()


def answers_kept(item: Item, hits: Tensor) -> list[bool]:
    """For each answer, a run of response tokens, whether all of its tokens are hits.

    Args:
        item: the item.
        hits: as `predicted` gives them.
    """
    ranges = [end - start for start, end in item.to_dict()["response"]]
    ranges[0] -= item.response[0]  # the first token is never predicted
    return [bool(part.all()) for part in hits.split(ranges) if len(part)]
