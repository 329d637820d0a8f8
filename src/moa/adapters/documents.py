"""Which tokens of a block's forward are text, and where documents begin among them.

What is carried from token to token (a running mean) must not cross the border between two documents that were packed
into one row, however the border is marked: by position ids that start again, by cumulative lengths, or by a mask
through which a token sees nothing before itself. All are read off the block's own arguments, so that a recomputed
forward finds those of its own batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HIDDEN = -5000.0
"""What an additive mask makes smaller than this it hides; less is a bias, such as ALiBi's."""


def text_positions(hidden: Tensor, mask: Any, seen: Any) -> Tensor | None:
    """Which tokens are text, (batch, tokens) bool; None if nothing is padded. A token is text if it may see itself.

    Args:
        hidden: the block's input (batch, tokens, features).
        mask: the block's ``attention_mask``: None, (batch, keys), (batch, 1 or heads, tokens, keys), boolean (True:
            visible) or additive, or one of FlexAttention's block masks.
        seen: tokens in the KV cache before these, a number or a tensor of one.
    """
    if mask is None:
        return None
    batch, length = hidden.shape[:2]
    if not isinstance(mask, Tensor):
        queries = torch.arange(length, device=hidden.device)
        return _block_mask(mask, batch, queries, queries + seen)
    if mask.dim() == 2:
        return _of_these(mask.bool(), length, seen)
    visible = _visible(mask)
    if visible.shape[-2] != length:  # one row of keys for all queries: padding alone, causality is elsewhere
        return _of_these(visible[:, 0], length, seen).expand(batch, length)
    return visible.gather(-1, _own_key(visible, seen).expand(*visible.shape[:-1], 1)).squeeze(-1).expand(batch, length)


def document_starts(hidden: Tensor, arguments: dict[str, Any], mask: Any, tokens: Tensor | None, seen: Any) -> Any:
    """Where documents begin, (batch, tokens) bool; None if there is one per row, continued from the cache if any.

    Args:
        hidden: the block's input (batch, tokens, features).
        arguments: what the block was called with, by name.
        mask: its attention mask, as for `text_positions`.
        tokens: which tokens are text, None: all.
        seen: tokens in the KV cache before these.
    """
    batch, length = hidden.shape[:2]
    starts = torch.zeros(batch, length, dtype=torch.bool, device=hidden.device)
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == length:
        starts[:, 1:] |= (positions[:, 1:] <= positions[:, :-1]).expand(batch, -1)
    lengths = next(
        (arguments[name] for name in ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens") if name in arguments), None
    )
    if isinstance(lengths, Tensor):
        inner = lengths[(lengths > 0) & (lengths < length)].long()
        starts[:, inner] = True
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2] == length:
        starts |= _sees_nothing_before(_visible(mask), seen).expand(batch, length)
    elif mask is not None and not isinstance(mask, Tensor) and length > 1:
        queries = torch.arange(1, length, device=hidden.device)
        starts[:, 1:] |= ~_block_mask(mask, batch, queries, queries + seen - 1)
    if tokens is not None:
        starts &= tokens
    return starts if torch.compiler.is_compiling() or bool(starts.any()) else None


def _of_these(keys: Tensor, length: int, seen: Any) -> Tensor:
    """Of (batch, keys) what is said of these ``length`` tokens. Blocks with states instead of keys are told no more."""
    return keys.index_select(1, _places(length, keys, seen))


def _visible(mask: Tensor) -> Tensor:
    """A 4-dimensional mask as (batch or 1, tokens, keys) bool."""
    first = mask[:, 0]
    return first if first.dtype == torch.bool else first > HIDDEN


def _own_key(visible: Tensor, seen: Any) -> Tensor:
    """Where each token's own key stands in a mask (..., tokens, keys): (tokens, 1)."""
    return _places(visible.shape[-2], visible, seen).unsqueeze(-1)


def _places(length: int, mask: Tensor, seen: Any) -> Tensor:
    """Where these tokens' own keys stand in a mask (..., keys): (tokens,). Sliding caches drop old keys."""
    last = mask.shape[-1] - length
    first = seen.clamp(max=last) if isinstance(seen, Tensor) else min(seen, last)
    return torch.arange(length, device=mask.device) + first


def _sees_nothing_before(visible: Tensor, seen: Any) -> Tensor:
    keys = torch.arange(visible.shape[-1], device=visible.device)
    return ~(visible & (keys < _own_key(visible, seen))).any(-1)


def _block_mask(mask: Any, batch: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether FlexAttention's mask lets each query see the key at the same place of ``keys``: (batch, queries)."""
    rows = torch.arange(batch, device=queries.device).unsqueeze(-1)
    if not hasattr(mask, "mask_mod"):
        raise ValueError(
            f"instance-level routing and balance losses cannot read padding off a {type(mask).__name__}; use the "
            "attention implementation 'sdpa', 'eager', 'flex_attention' or 'flash_attention_2'"
        )
    seen: Tensor = mask.mask_mod(rows, torch.zeros_like(rows), queries, keys)
    return seen.expand(batch, len(queries))
