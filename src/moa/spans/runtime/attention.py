"""The attention function of a plan, one per host implementation: ``spans|sdpa`` runs ``sdpa`` where nothing is cut.

It is registered with transformers' attention interface and looks up whether a plan is applied to the module that calls
it, so other models never notice. Where all heads see everything, the host's function runs with the host's own mask: the
result is the dense one, bit for bit (in half precision: of what is read at once). Elsewhere heads of the same span are
computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa import _hosts
from moa.spans.layout import Sight, positions
from moa.spans.runtime import columns, masks
from moa.spans.runtime.cache import Owner, SpanLayer
from moa.spans.runtime.columns import Kernel, Places, Run
from moa.spans.runtime.heads import groups, heads_of
from moa.spans.runtime.kernels import UNFUSED, kernel

PREFIX = "spans|"


@dataclass(frozen=True)
class Site:
    """An attention module under a plan: the layer it is, and who applied the plan."""

    owner: Owner
    layer: int


SITES: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()


def register(host: str) -> str:
    """Register the plan's attention and masks on top of ``host``; return the implementation's name."""
    name = PREFIX + host
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _on_top_of(host))
        masks.register(name, host)
    return name


def _on_top_of(host: str) -> Callable[..., tuple[Tensor, Any]]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **rest: Any,
    ) -> tuple[Tensor, Any]:
        site = SITES.get(module)
        layer = None
        if site is not None:
            layer, site.owner.handover.layer = site.owner.handover.layer, None
        if site is not None and not _dense(site, layer, query, key, attention_mask):
            run = kernel(module, host, query.dtype, scaling, dropout, rest)
            return _planned(site, layer, run, query, key, value, attention_mask).transpose(1, 2).contiguous(), None
        mask = masks.host_mask(attention_mask)
        if layer is not None and _grouped(host, query, key, rest):
            run = kernel(module, host, query.dtype, scaling, dropout, rest)
            result = run(query, key, value, mask).transpose(1, 2).contiguous(), None
        else:
            function = _hosts.attention_function(module, host)
            result = function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **rest)
        if layer is not None:
            layer.take_in(key, value, query.shape[2], _latest(attention_mask, query.shape[2]))
        return result

    return forward


def _grouped(host: str, query: Tensor, key: Tensor, rest: dict[str, Any]) -> bool:
    """Whether query heads are better rows of their KV head: one token, in half precision.

    Torch's attention of one grouped query takes several times as long there. In float32 it does not, and a plain layer
    stays equal to the dense one to the bit.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    fused = host == "sdpa" and all(rest.get(name) is None for name in UNFUSED)
    return fused and half and query.shape[2] == 1 and query.shape[1] > key.shape[1]


def _dense(site: Site, layer: SpanLayer | None, query: Tensor, key: Tensor, mask: Any) -> bool:
    """Whether all heads see everything, and the host can do it."""
    if layer is None:
        return min(_uncached_spans(site, key)) >= key.shape[2]
    if layer.rings and isinstance(mask, Tensor):
        raise ValueError(
            f"layer {site.layer}: a cache under a span plan needs a causal mask with or without padding, "
            f"given as (batch, tokens); got a mask of shape {tuple(mask.shape)}"
        )
    return not layer.rings or (layer.columns == 0 and min(ring.span for ring in layer.rings) >= query.shape[2])


def _planned(
    site: Site, layer: SpanLayer | None, run: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Any
) -> Tensor:
    if layer is None:
        if isinstance(mask, Tensor):
            return _under_any_mask(site, run, query, key, value, mask)
        return _uncached(site, run, query, key, value, mask)
    if query.shape[2] == 1 and layer.columns:
        return _decode(layer, run, query, key, value, _latest(mask, 1))
    return _append(site.owner.sight, layer, run, query, key, value, mask)


def _latest(mask: Any, new: int) -> Tensor | None:
    return mask.latest(new) if isinstance(mask, masks.TextMask) else None


def _uncached_spans(site: Site, key: Tensor) -> tuple[int, ...]:
    text = key.shape[2]
    spans = site.owner.spans
    return spans.at(spans.reach(site.owner.length, text, text))[site.layer]


def _uncached(site: Site, run: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Training, or a forward that keeps its keys in an ordinary cache."""
    tokens = mask.tokens if mask is not None else None
    old, new = key.shape[2] - query.shape[2], query.shape[2]
    text: Run | Places = Run(0, 0, old, new, key.device)
    if tokens is not None:
        as_query, as_key = positions(0, key.shape[2], tokens, key.device)
        text = Places(as_query[:, -new:], as_key)
    prepared = mask.prepared if mask is not None else None

    def one(query: Tensor, heads: tuple[int, ...], span: int) -> Tensor:
        keys, values = heads_of(key, heads), heads_of(value, heads)
        return columns.attend(run, query, keys, values, text, span, site.owner.sight, prepared)

    return _by_group(query, key.shape[1], groups(_uncached_spans(site, key)), one)


def _under_any_mask(site: Site, run: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Packed sequences and the like, ``mask`` ``(batch or 1, 1, q, k)``: positions count from a row's first key."""
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"layer {site.layer}: under a span plan a custom mask needs all keys at once, without a cache")
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    start = allowed[:, 0].int().argmax(-1)
    at = torch.arange(key.shape[2], device=key.device) - start

    def one(query: Tensor, heads: tuple[int, ...], span: int) -> Tensor:
        seen = allowed & site.owner.sight.visible(at, at, span)[:, None]
        seen = seen | ~seen.any(-1, keepdim=True)  # padding sees anything, so that no row is empty
        shared = query.shape[1] // len(heads)
        return run(query, heads_of(key, heads), heads_of(value, heads), run.prepare(seen, shared))

    spans = site.owner.spans
    text = int(at.max()) + 1
    chosen = spans.at(spans.reach(site.owner.length, text, text))[site.layer]
    return _by_group(query, key.shape[1], groups(chosen), one)


def _decode(layer: SpanLayer, run: Kernel, query: Tensor, key: Tensor, value: Tensor, tokens: Tensor | None) -> Tensor:
    """One token of every row: write it over the one that leaves the window, then attend to the ring."""
    layer.take_in(key, value, 1, tokens)

    def one(query: Tensor, heads: tuple[int, ...], span: int) -> Tensor:
        ring = next(ring for ring in layer.rings if ring.heads == heads)
        filled = ring.filled(layer.count)
        if isinstance(filled, int):
            return run(query, ring.keys[:, :, :filled], ring.values[:, :, :filled], None)
        used = torch.arange(ring.span, device=key.device) < filled.clamp(min=1)[:, None]
        mask = run.prepare(used[:, None, None], query.shape[1] // len(heads))
        return run(query, ring.keys, ring.values, mask)

    return _by_group(query, key.shape[1], {ring.heads: ring.span for ring in layer.rings}, one)


def _append(
    sight: Sight, layer: SpanLayer, run: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Any
) -> Tensor:
    """A prefill, onto what the cache holds if it holds something."""
    new, count = query.shape[2], layer.count
    tokens = _latest(mask, new)
    prepared = mask.prepared if isinstance(mask, masks.TextMask) else None

    def one(query: Tensor, heads: tuple[int, ...], span: int) -> Tensor:
        ring = next(ring for ring in layer.rings if ring.heads == heads)
        keys, values = heads_of(key, heads), heads_of(value, heads)
        text: Run | Places
        if isinstance(count, int) and isinstance(ring.base, int) and tokens is None:
            text = Run(*ring.held(count), count, new, key.device) if layer.columns else Run(0, 0, 0, new, key.device)
            if layer.columns:
                old_keys, old_values = ring.read(count)
                keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
            return columns.attend(run, query, keys, values, text, span, sight, prepared)
        at, place = positions(count, new, tokens, key.device)
        if layer.columns:
            old_keys, old_values, old = ring.history(count)
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
            rows = max(old.shape[0], place.shape[0])
            place = torch.cat([old.expand(rows, -1), place.expand(rows, -1)], 1)
        return columns.attend(run, query, keys, values, Places(at, place), span, sight)

    output = _by_group(query, key.shape[1], {ring.heads: ring.span for ring in layer.rings}, one)
    layer.take_in(key, value, new, tokens)
    return output


def _by_group(
    query: Tensor,
    kv_heads: int,
    parted: dict[tuple[int, ...], int],
    one: Callable[[Tensor, tuple[int, ...], int], Tensor],
) -> Tensor:
    """Every group of KV heads with its query heads, put together in the model's order."""
    if len(parted) == 1:
        heads, span = next(iter(parted.items()))
        return one(query, heads, span)
    shared = query.shape[1] // kv_heads
    order: list[int] = []
    parts: list[Tensor] = []
    for heads, span in parted.items():
        mine = tuple(h * shared + i for h in heads for i in range(shared))
        parts.append(one(heads_of(query, mine), heads, span))
        order.extend(mine)
    output = torch.cat(parts, 1)
    if order == sorted(order):
        return output
    return output.index_select(1, torch.tensor(order, device=query.device).argsort())
