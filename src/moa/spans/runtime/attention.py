"""The attention function of a plan, one per host implementation: ``spans|sdpa`` runs ``sdpa`` where nothing is cut.

It is registered with transformers' attention interface and looks up whether a plan is applied to the module that calls
it, so other models never notice. Where all heads see everything, the host's function runs with the host's own mask: the
result is the dense one, bit for bit (in half precision: of what is read at once). Elsewhere heads of the same span are
computed together: many tokens by `moa.spans.runtime.kernels.Prompt`, one token by a look at the ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa import _hosts
from moa.spans.runtime.cache import Owner, SpanLayer
from moa.spans.runtime.kernels import UNFUSED, Kernel, Prompt, kernel
from moa.spans.runtime.ring import Ring, groups, heads_of, runs
from moa.spans.runtime.visibility import TextMask, host_mask, register_masks

PREFIX = "spans|"
Part = TypeVar("Part")


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
        register_masks(name, host)
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
        site, layer, new = SITES.get(module), None, query.shape[2]
        if site is not None:
            layer = _handed_over(site)
            if key.shape[1] != (heads := site.owner.spans.shape.kv_heads):
                raise ValueError(
                    f"layer {site.layer}: {type(module).__name__} attends to {key.shape[1]} KV heads, where its "
                    f"configuration has {heads}: spans are per KV head, and cannot tell which is which"
                )
            if not _dense(site, layer, key, attention_mask):
                run = kernel(module, host, query.dtype, scaling, dropout, rest)
                inputs = run, query, key, value, attention_mask
                output = _uncached(site, *inputs) if layer is None else _cached(site, layer, *inputs)
                return output.transpose(1, 2).contiguous(), None
        mask = host_mask(attention_mask)
        if layer is not None and _grouped(host, query, key, rest):
            run = kernel(module, host, query.dtype, scaling, dropout, rest)
            result = run(query, key, value, mask).transpose(1, 2).contiguous(), None
        else:
            function = _hosts.attention_function(module, host)
            result = function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **rest)
        if layer is not None:
            text = _text(attention_mask)
            layer.take_in(key, value, new, text.padding(new, key.device, ask=True), text)
        return result

    return forward


def _handed_over(site: Site) -> SpanLayer | None:
    """The cache's layer that has just taken this module's keys; None if they went to none of a plan's.

    Raises:
        ValueError: the module attends a second time, with keys that no layer of the cache has seen as they are now.
    """
    handover = site.owner.handover
    layer, handover.layer = handover.layer, None
    if layer is not None:
        handover.read = site.layer
    elif handover.read == site.layer:
        raise ValueError(
            f"layer {site.layer} attends twice to one set of keys: its model cannot use a cache under a span plan; "
            "give use_cache=False"
        )
    return layer


def _text(mask: Any) -> TextMask:
    """The causal text that a mask stands for; of models that make none, one without padding."""
    return mask if isinstance(mask, TextMask) else TextMask(None, lambda: mask)


def _grouped(host: str, query: Tensor, key: Tensor, rest: dict[str, Any]) -> bool:
    """Whether query heads are better rows of their KV head: one token, in half precision.

    Torch's attention of one grouped query takes several times as long there. In float32 it does not, and a plain layer
    stays equal to the dense one to the bit.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    fused = host == "sdpa" and all(rest.get(name) is None for name in UNFUSED)
    return fused and half and query.shape[2] == 1 and query.shape[1] > key.shape[1]


def _dense(site: Site, layer: SpanLayer | None, key: Tensor, mask: Any) -> bool:
    """Whether all heads see everything, and the host can do it."""
    if layer is None:
        return min(_spans(site, key.shape[2])) >= key.shape[2]
    if layer.rings and isinstance(mask, Tensor):
        raise ValueError(
            f"layer {site.layer}: a cache under a span plan needs a causal mask with or without padding, "
            f"given as (batch, tokens); got a mask of shape {tuple(mask.shape)}"
        )
    return not layer.rings


def _spans(site: Site, text: int) -> tuple[int, ...]:
    spans = site.owner.spans
    return spans.at(spans.reach(site.owner.length, text, text))[site.layer]


def _cached(site: Site, layer: SpanLayer, run: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """A layer with rings: one token reads them after it is in, more tokens before, as they push others out."""
    text, new = _text(mask), query.shape[2]
    padding = text.padding(new, key.device, ask=not site.owner.static)
    rings = {ring.heads: ring for ring in layer.rings}
    if new == 1 and layer.begun:
        layer.take_in(key, value, new, padding, text)
        return _by_group(query, key.shape[1], rings, lambda query, _, ring: _look(layer, run, query, ring, text))
    if padding is not None:
        query, key, value = padding.pack(query), padding.pack(key), padding.pack(value)
    prompt = Prompt(run, site.owner.sight, layer.count if layer.begun else 0, text)

    def read(query: Tensor, heads: tuple[int, ...], ring: Ring) -> Tensor:
        keys, values = heads_of(key, heads), heads_of(value, heads)
        return prompt.attend(query, keys, values, ring.span, ring if layer.begun else None)

    output = _by_group(query, key.shape[1], rings, read)
    layer.take_in(key, value, new, padding, text)
    return output if padding is None else padding.unpack(output)


def _look(layer: SpanLayer, run: Kernel, query: Tensor, ring: Ring, text: TextMask) -> Tensor:
    """One token of every row, which is in the ring already."""
    if isinstance(layer.count, int):
        filled = ring.filled(layer.count)
        return run(query, ring.keys[:, :, :filled], ring.values[:, :, :filled], None)
    shared = query.shape[1] // len(ring.heads)

    def make() -> Tensor:
        filled = torch.as_tensor(ring.filled(layer.count)).clamp(min=1)  # a row without a token sees anything
        used = torch.arange(ring.span, device=query.device) < filled[:, None]
        return run.prepare(used[:, None, None], shared)

    return run(query, ring.keys, ring.values, text.once(("look", run.dtype, ring.kind, shared), make))


def _uncached(site: Site, run: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Training, or a forward that keeps its keys in an ordinary cache."""
    if isinstance(mask, Tensor):
        return _under_any_mask(site, run, query, key, value, mask)
    text, columns = _text(mask), key.shape[2]
    spans, padding = groups(_spans(site, columns)), text.padding(columns, key.device, ask=not site.owner.static)
    if query.shape[2] < columns:
        tokens = torch.ones_like(key[:1, 0, :, 0], dtype=torch.bool) if padding is None else padding.flags
        place = tokens.cumsum(1) - 1
        return _masked(site, run, query, key, value, tokens[:, None, None], place, spans)
    if padding is not None:
        query, key, value = padding.pack(query), padding.pack(key), padding.pack(value)
    prompt = Prompt(run, site.owner.sight, 0, text)

    def read(query: Tensor, heads: tuple[int, ...], span: int) -> Tensor:
        return prompt.attend(query, heads_of(key, heads), heads_of(value, heads), span, None)

    output = _by_group(query, key.shape[1], spans, read)
    return output if padding is None else padding.unpack(output)


def _under_any_mask(site: Site, run: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Packed sequences and the like, ``mask`` ``(batch or 1, 1, q, k)``: positions count from a row's first key."""
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"layer {site.layer}: under a span plan a custom mask needs all keys at once, without a cache")
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    place = torch.arange(key.shape[2], device=key.device) - allowed[:, 0].int().argmax(-1)
    handover = site.owner.handover
    if handover.longest is None or handover.longest[0]() is not mask:  # asked once for all layers
        handover.longest = ref(mask), int(place.max()) + 1
    return _masked(site, run, query, key, value, allowed, place, groups(_spans(site, handover.longest[1])))


def _masked(
    site: Site,
    run: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    place: Tensor,
    spans: dict[tuple[int, ...], int],
) -> Tensor:
    """Under what a mask ``(batch or 1, 1, q or 1, k)`` allows, with keys at positions ``(batch or 1, k)``."""

    def one(query: Tensor, heads: tuple[int, ...], span: int) -> Tensor:
        seen = allowed & site.owner.sight.visible(place[:, -query.shape[2] :], place, span)[:, None]
        seen = seen | ~seen.any(-1, keepdim=True)  # padding sees anything, so that no row is empty
        shared = query.shape[1] // len(heads)
        return run(query, heads_of(key, heads), heads_of(value, heads), run.prepare(seen, shared))

    return _by_group(query, key.shape[1], spans, one)


def _by_group(
    query: Tensor,
    kv_heads: int,
    parts: dict[tuple[int, ...], Part],
    one: Callable[[Tensor, tuple[int, ...], Part], Tensor],
) -> Tensor:
    """Every group of KV heads with its query heads, put together in the model's order."""
    if len(parts) == 1:
        return one(query, *next(iter(parts.items())))
    shared = query.shape[1] // kv_heads
    found: dict[int, Tensor] = {}
    for heads, part in parts.items():
        output, end = one(heads_of(query, heads, shared), heads, part), 0
        for run in runs(heads, shared):
            start, end = end, end + run.stop - run.start
            found[run.start] = output[:, start:end]
    return torch.cat([found[head] for head in sorted(found)], 1)
