"""Instance-level routing: what the router reads when one decision is made for the text so far.

The mean over the tokens up to each position is causal, ignores left padding, and is the same in cached decoding: the
running sum travels with the KV cache, and beam search reorders both together.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_STATE = "moa_running_means"


def text_positions(hidden: Tensor, mask: Any, past: Any, layer: int) -> Tensor | None:
    """Which of the block's tokens are text: (batch, tokens) bool, or None if there is no padding.

    Read off the block's own attention mask, so that a recomputed forward sees the mask of its own batch: a token is
    text exactly if it may attend to itself.

    Args:
        hidden: (batch, tokens, features).
        mask: the block's ``attention_mask``: None, (batch, keys), or (batch, 1 or heads, tokens, keys), boolean or
            additive.
        past: the KV cache, or None.
        layer: the block's number, to ask the cache how many keys came before.

    Raises:
        ValueError: a mask of another kind (FlexAttention's block masks).
    """
    if mask is None:
        return None
    batch, length = hidden.shape[:2]
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"instance-level routing and balance losses cannot read padding off a {type(mask).__name__}; "
            "use the attention implementation 'sdpa', 'eager' or 'flash_attention_2'"
        )
    seen = _seen_tokens(past, layer)
    if mask.dim() == 2:
        return mask[:, seen : seen + length].bool()
    window = mask.shape[-1]
    first = min(seen, window - length)  # sliding caches drop the oldest keys
    keys = torch.arange(first, first + length, device=mask.device)
    diagonal = mask[:, 0, torch.arange(length, device=mask.device), keys]
    text = diagonal if diagonal.dtype == torch.bool else diagonal >= 0
    return text.expand(batch, length)


def pool(features: Tensor, level: str, tokens: Tensor | None, past: Any, key: tuple[int, str]) -> Tensor:
    """The router's input for ``level``, (batch, tokens, features).

    Args:
        features: (batch, tokens, features).
        level: see `moa.adapters.routers.Router`.
        tokens: (batch, tokens), True for text; None: all.
        past: the KV cache, which also keeps the running state; None: no text came before.
        key: (block number, adapter name), to find that state.
    """
    if level == "token":
        return features
    if level == "reference-instance":
        return _reference_mean(features, past, key)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    counts = torch.ones_like(wide[..., :1])
    if tokens is not None:
        counts = tokens.unsqueeze(-1).to(wide.dtype)
    total, count = (wide * counts).cumsum(1), counts.cumsum(1)
    if past is not None:
        state = _state_of(past)
        if _seen_tokens(past, key[0]) > 0:
            before = state.get(key)
            if before is None or before["length"] != _seen_tokens(past, key[0]):
                raise ValueError(
                    "instance-level routing lost track of this KV cache: it was filled without the adapter, cropped, "
                    "or copied in part. Start from an empty cache."
                )
            total, count = total + before["total"], count + before["count"]
        state[key] = {
            "total": total[:, -1:].detach(),
            "count": count[:, -1:].detach(),
            "length": _seen_tokens(past, key[0]) + features.shape[1],
        }
    return (total / count.clamp_min(1)).to(features.dtype)


def _reference_mean(features: Tensor, past: Any, key: tuple[int, str]) -> Tensor:
    """The official mean over everything, kept while decoding (`LLaMA3_soft_moa_instance/llama/llama.py`)."""
    if past is not None and _seen_tokens(past, key[0]) > 0:
        mean = _state_of(past)[key]["total"]
    else:
        mean = features.mean(1, keepdim=True)
        if past is not None:
            _state_of(past)[key] = {"total": mean.detach()}
    return mean.expand_as(features)


def _seen_tokens(past: Any, layer: int) -> int:
    return 0 if past is None else int(past.get_seq_length(layer))


def _state_of(past: Any) -> dict[tuple[int, str], dict[str, Any]]:
    """The running state on a cache, whose batch rows will from now on be moved together with the cache's."""
    if _STATE not in past.__dict__:
        past.__dict__[_STATE] = {}
        past.__class__ = _remembering_class(past.__class__)
    return past.__dict__[_STATE]


@functools.cache
def _remembering_class(base: Any) -> Any:
    """A cache class that carries running means along when rows are reordered, repeated, selected or reset."""

    def rows(method: str, move: Any) -> Any:
        def moved(self: Any, argument: Any) -> Any:
            for state in self.__dict__[_STATE].values():
                state.update({k: move(v, argument) for k, v in state.items() if isinstance(v, Tensor)})
            return getattr(base, method)(self, argument)

        return moved

    def reset(self: Any) -> Any:
        self.__dict__[_STATE].clear()
        return base.reset(self)

    namespace: dict[str, Any] = {
        "reorder_cache": rows("reorder_cache", lambda t, index: t.index_select(0, index.to(t.device))),
        "batch_repeat_interleave": rows("batch_repeat_interleave", lambda t, n: t.repeat_interleave(n, dim=0)),
        "batch_select_indices": rows("batch_select_indices", lambda t, index: t[index]),
        "reset": reset,
        "__reduce_ex__": lambda self, protocol: (_new_remembering, (base,), self.__dict__),
    }
    return type(base.__name__, (base,), namespace | {"__module__": base.__module__})


def _new_remembering(base: Any) -> Any:
    cls = _remembering_class(base)
    return cls.__new__(cls)
