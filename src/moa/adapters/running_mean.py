"""Instance-level routing: what the router reads when one decision is made for the text so far.

The mean over a document's tokens up to each position is causal, ignores padding, and is the same in cached decoding.
There the running sums ride on the KV cache as one more of its layers (`RunningMeans`): transformers' own methods then
reset, reorder, repeat and select their rows together with the keys and values, copy them and throw them away.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from moa import _hosts
from moa.adapters.documents import document_starts, text_positions

KEPT = 128
"""Sums of so many last tokens are kept, so that a cache may be cropped by as many (assisted decoding)."""


class Sums(NamedTuple):
    """One block's running state: ``sums`` (batch, kept, features + 1), the last column counts tokens; ``end`` is the
    number of tokens in the cache after the last of them.
    """

    sums: Tensor
    end: int

    def until(self, end: int) -> Sums:
        """The state after the first ``end`` tokens, as far as it is known; itself if it has not seen more."""
        beyond = self.end - end
        return self if beyond <= 0 else Sums(self.sums[:, : max(self.sums.shape[1] - beyond, 0)], end)


class RunningMeans(_hosts.LAYER_WITHOUT_KEYS):  # type: ignore[misc]
    """A layer of a KV cache that holds no keys but what instance-level routers remember, by block and adapter.

    It has what transformers asks of any layer.
    """

    is_compileable: ClassVar[bool] = True
    is_croppable: ClassVar[bool] = True
    supports_early_init: ClassVar[bool] = False
    is_initialized: ClassVar[bool] = True
    keys: ClassVar[None] = None
    values: ClassVar[None] = None

    def __init__(self, is_sliding: bool) -> None:
        self.is_sliding = is_sliding  # as the cache's first layer: whoever looks for the first of a kind finds that one
        self.states: dict[tuple[int, str], Sums] = {}

    def reset(self) -> None:
        self.states.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._move(lambda sums: sums.index_select(0, beam_idx.to(sums.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move(lambda sums: sums.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(lambda sums: sums[indices])

    def _move(self, function: Any) -> None:
        self.states = {key: Sums(function(state.sums), state.end) for key, state in self.states.items()}

    def crop(self, tokens: int) -> None:
        """Forget the sums of what is taken back, the last ``-tokens``, since other tokens may come in their place
        without the adapter. Older transformers say instead how many are kept.
        """
        if tokens:
            ends = {key: state.end + tokens if tokens < 0 else tokens for key, state in self.states.items()}
            self.states = {key: state.until(ends[key]) for key, state in self.states.items()}

    def offload(self) -> None:
        """Nothing that would be worth it."""

    prefetch = offload

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def means_of(past: Any, blocks: int) -> RunningMeans:
    """The cache's `RunningMeans`, put behind the layers of the model's ``blocks`` if it has none yet."""
    for layer in reversed(past.layers):
        if isinstance(layer, RunningMeans):
            return layer
    if type(past).__len__ is not Cache.__len__:  # it has layers of its own beside these, and would be led astray
        raise ValueError(
            f"instance-level routing cannot keep its state on a {type(past).__name__}. Use a router with level='token' "
            "or use_cache=False"
        )
    # Of the caches with fewer layers than blocks, some make them when they are first needed; in others, the last blocks
    # share the keys of earlier ones or do not run.
    while len(past.layers) < blocks and past.layer_class_to_replicate is not None:
        past.layers.append(past.layer_class_to_replicate())
    past.layers.append(RunningMeans(getattr(past.layers[0], "is_sliding", False)))
    return past.layers[-1]  # type: ignore[no-any-return]


def seen_tokens(past: Any, block: int, length: int) -> Any:
    """How many tokens came before the ``length`` of this forward: a number, or a tensor of one if shapes are static.

    In hybrid models some layers of a cache do not count. Then one that comes later in the forward says it, which has
    not been told of this forward's tokens yet, or else an earlier one, which has.
    """
    if past is None:
        return 0
    layers = [index for index, layer in enumerate(past.layers) if not isinstance(layer, RunningMeans)]
    after, before = layers[block:], layers[:block][::-1]
    if not after and not before:
        return 0
    for index in (*after, *before):
        try:
            seen = past.get_seq_length(index)
        except ValueError:  # no attention there
            continue
        seen = seen - length if index < block else seen
        return seen if torch.compiler.is_compiling() else int(seen)
    raise ValueError(f"instance-level routing cannot follow a {type(past).__name__}: none of its layers counts tokens")


class Text(NamedTuple):
    """What `pool` needs to know of a forward: see `moa.adapters.documents` for ``tokens`` and ``starts``."""

    tokens: Tensor | None
    starts: Tensor | None


def text_of(hidden: Tensor, arguments: dict[str, Any], mask_hides: bool, block: int) -> Text:
    """Read both off the block's arguments.

    Raises:
        ValueError: continuous batching, whose rows mix requests that no state can follow.
    """
    if arguments.get("block_table") is not None or _hosts.is_paged(arguments.get("cache")):
        raise ValueError(
            "instance-level routing cannot follow continuous batching (generate_batch): its rows mix requests. Use "
            "generate(), or a router with level='token'"
        )
    mask = arguments.get("attention_mask")
    if mask_hides and mask is not None:
        mask = ~mask
    seen = seen_tokens(_hosts.cache_of(arguments), block, hidden.shape[1])
    tokens = text_positions(hidden, mask, seen)
    return Text(tokens, document_starts(hidden, arguments, mask, tokens, seen))


def pool(features: Tensor, level: str, text: Text, past: Any, key: tuple[int, str], blocks: int) -> Tensor:
    """The router's input for ``level``, (batch, tokens, features).

    Args:
        features: (batch, tokens, features).
        level: see `moa.adapters.routers.Router`.
        text: which tokens count and where documents begin.
        past: the KV cache, or None.
        key: (block number, adapter name), to find the state of earlier forwards.
        blocks: how many the model has.

    Raises:
        ValueError: the cache holds tokens that the adapter has not seen.
    """
    if level == "token":
        return features
    if level == "reference-instance":
        return _reference_mean(features, past, key, blocks)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    counted = torch.cat([wide, torch.ones_like(wide[..., :1])], dim=-1)
    if text.tokens is not None:
        counted = counted * text.tokens.unsqueeze(-1).to(wide.dtype)
    sums = counted.cumsum(1)
    if text.starts is not None:  # of every token: what had been summed up before its document
        place = torch.arange(sums.shape[1], device=sums.device).expand(sums.shape[:2])
        first = place.where(text.starts, torch.zeros_like(place)).cummax(1).values
        before = (sums - counted).gather(1, first.unsqueeze(-1).expand_as(sums))
        sums = sums - before
    if past is not None:
        sums = _continued(sums, text.starts, past, key, blocks)
    return (sums[..., :-1] / sums[..., -1:].clamp_min(1)).to(features.dtype)


def _continued(sums: Tensor, starts: Tensor | None, past: Any, key: tuple[int, str], blocks: int) -> Tensor:
    """``sums`` with those of earlier forwards on this cache, which keeps the new ones."""
    means, seen = means_of(past, blocks), seen_tokens(past, key[0], sums.shape[1])
    state = means.states.get(key)
    if isinstance(seen, Tensor):  # compiled with static shapes: nothing here may depend on a number
        if state is not None:
            sums = sums + state.sums[:, -1:] * (seen > 0)
        means.states[key] = Sums(sums[:, -1:], 0)
        return sums
    if seen > 0:
        before = None if state is None else _at(state, seen)
        if before is None:
            raise ValueError(
                "instance-level routing lost track of this KV cache: it was filled without the adapter, or cropped by "
                f"more than {KEPT} tokens. Start from an empty cache."
            )
        if starts is not None:
            before = before * (~starts.cummax(1).values).unsqueeze(-1)
        sums = sums + before
    kept = sums  # with its history, as the keys and values in the cache have theirs
    if seen > 0 and state is not None and sums.shape[1] < KEPT:
        earlier = state.sums[:, : state.sums.shape[1] - (state.end - seen)]
        kept = torch.cat([earlier[:, -(KEPT - kept.shape[1]) :], kept], dim=1)
    means.states[key] = Sums(kept[:, -KEPT:].clone(), seen + sums.shape[1])
    return sums


def _at(state: Sums, seen: int) -> Tensor | None:
    """The sums after ``seen`` tokens, (batch, 1, features + 1); None if they are not known."""
    index = state.sums.shape[1] - 1 - (state.end - seen)
    return state.sums[:, index : index + 1] if 0 <= index < state.sums.shape[1] else None


def _reference_mean(features: Tensor, past: Any, key: tuple[int, str], blocks: int) -> Tensor:
    """The official mean over everything, kept while decoding (`LLaMA3_soft_moa_instance/llama/llama.py`)."""
    states = {} if past is None else means_of(past, blocks).states
    if past is not None and seen_tokens(past, key[0], features.shape[1]) > 0 and key in states:
        mean = states[key].sums
    else:
        mean = features.mean(1, keepdim=True)
        states[key] = Sums(mean, 0)
    return mean.expand_as(features)
