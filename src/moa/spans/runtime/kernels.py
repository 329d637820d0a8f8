"""How one group of heads attends, under each host implementation that a plan can run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moa import _hosts
from moa.spans.runtime.columns import Kernel

HOSTS = ("sdpa", "eager")
UNFUSED = ("softcap", "position_bias", "s_aux")  # what torch's fused attention cannot do


def kernel(
    module: nn.Module, host: str, dtype: torch.dtype, scaling: float | None, dropout: float, rest: dict[str, Any]
) -> Kernel:
    """The host's arithmetic on some heads of ``module``, whose queries have ``dtype``; ``rest`` is what else it gets.

    Raises:
        ValueError: the module asks for something that torch's fused attention cannot do.
    """
    if host == "sdpa":
        for name in UNFUSED:
            if rest.get(name) is not None:
                raise ValueError(
                    f"{type(module).__name__} has {name}: a span plan needs attn_implementation='eager' for it"
                )
        return Sdpa(dtype, scaling, dropout)
    function = _hosts.attention_function(module, host)
    return Eager(dtype, partial(function, module, scaling=scaling, dropout=dropout, **rest))


class Sdpa:
    """Torch's fused attention. Query heads of a KV head become more rows of it, so its keys are never repeated."""

    def __init__(self, dtype: torch.dtype, scaling: float | None, dropout: float) -> None:
        self.dtype = dtype
        self.settings: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}

    def prepare(self, mask: Tensor, shared: int) -> Tensor:
        """Added to the scores, once for all calls that use it."""
        return _as_scores(mask, self.dtype).repeat(1, 1, shared, 1)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        batch, heads, new, _ = query.shape
        attend = functional.scaled_dot_product_attention
        if causal:
            return attend(query, key, value, is_causal=True, enable_gqa=heads > key.shape[1], **self.settings)
        if heads > key.shape[1]:
            query = query.reshape(batch, key.shape[1], heads // key.shape[1] * new, -1)
        return attend(query, key, value, mask, **self.settings).reshape(batch, heads, new, -1)


class Eager:
    """A modeling file's own attention, with everything special about it, such as soft-capped scores."""

    def __init__(self, dtype: torch.dtype, function: Callable[..., tuple[Tensor, Any]]) -> None:
        self.dtype, self.function = dtype, function

    def prepare(self, mask: Tensor, shared: int) -> Tensor:
        """Added to the scores; all heads share it."""
        return _as_scores(mask, self.dtype)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        if causal:
            pairs = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            mask = _as_scores(pairs.tril()[None, None], self.dtype)
        return self.function(query, key, value, mask)[0].transpose(1, 2)


def _as_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
