"""What a query sees of its text: which keys under a span, and which of the columns are tokens at all.

Positions count the tokens of a row; padding is none and takes none. A batch with padding is *packed* before attention,
every row's tokens first: after that, the column of a new token says where it is, for all rows alike, padding lies
behind everything that a token may see, and rows need no masks of their own.

Nothing here asks for a tensor's values, but for one question a forward (`TextMask.padding`), and none on request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function

from moa.spans.plan import SpanPlan
from moa.spans.rule import CONVENTIONS

HIDDEN = 1 << 40  # position of a key that nobody sees: later than every query
Key = tuple[object, ...]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Sight:
    """What a query sees of its past.

    Attributes:
        sink: first tokens that are always seen.
        block: granularity of a blockwise prefill, tokens.
        blockwise: rows of a prefill see whole blocks (published plans); else every row is exact to the token.
    """

    sink: int
    block: int
    blockwise: bool

    @classmethod
    def of(cls, plan: SpanPlan) -> Sight:
        """The sight of a plan's heads."""
        return cls(plan.sink, plan.block, CONVENTIONS[plan.convention].blockwise_prefill)

    def width(self, span: int) -> int:
        """Of the latest tokens, itself included, the most that a query of a prefill sees beside the sink."""
        window = max(span - self.sink, 0)
        return -(-window // self.block) * self.block if self.blockwise else window

    def visible(self, queries: Tensor, keys: Tensor, span: int) -> Tensor:
        """The mask of a prefill.

        Args:
            queries: positions ``(..., q)``.
            keys: positions ``(..., k)``; `HIDDEN` ones are seen by no token.
            span: of the head, sink included.

        Returns:
            ``(..., q, k)``, true where a query sees a key.
        """
        end = (queries // self.block + 1) * self.block if self.blockwise else queries + 1
        oldest, query, key = (end - self.width(span))[..., None], queries[..., None], keys[..., None, :]
        return (key <= query) & ((key < self.sink) | (key >= oldest))


class Padding:
    """Rows of which some columns are padding, and the way to put their tokens first.

    Args:
        tokens: ``(batch, columns)``, false for padding.

    Attributes:
        flags: as given.
        tokens: ``(batch,)``, how many of the columns are tokens.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.flags, self.tokens = tokens, tokens.sum(1)
        self._order = None
        if tokens.shape[1] > 1:
            self._order = tokens.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
            self._back = self._order.argsort(1)

    def pack(self, tensor: Tensor) -> Tensor:
        """``(batch, heads, columns, width)`` with every row's tokens first, in their order."""
        return tensor if self._order is None else _rearranged(tensor, self._order)

    def unpack(self, tensor: Tensor) -> Tensor:
        """The columns of a packed tensor where they were."""
        return tensor if self._order is None else _rearranged(tensor, self._back)


class TextMask:
    """Causal attention of a text, in place of a mask of all pairs; made once a forward, for all layers.

    Args:
        tokens: ``(batch, columns)``, false for padding; None if there is none.
        host: makes the host's mask.
    """

    def __init__(self, tokens: Tensor | None, host: Callable[[], Any]) -> None:
        self.tokens, self._host = tokens, host
        self._made: dict[Key, Any] = {}

    @cached_property
    def dense(self) -> Any:
        """The host implementation's mask of all pairs."""
        return self._host()

    def once(self, key: Key, make: Callable[[], Made]) -> Made:
        """What ``make`` returned at the first call with this key in this forward."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[no-any-return]

    def padding(self, columns: int, device: torch.device, ask: bool) -> Padding | None:
        """The padding among the latest columns; None if there is none, which needs a look at them (``ask``)."""
        if self.tokens is None:
            return None
        latest = self.tokens[:, -columns:]
        if ask and self.once(("all tokens", columns), lambda: bool(latest.all())):
            return None
        return self.once(("padding", columns, device), lambda: Padding(latest.to(device)))


def host_mask(mask: Any) -> Any:
    """The mask as the host implementation knows it."""
    return mask.dense if isinstance(mask, TextMask) else mask


def register_masks(name: str, host: str) -> None:
    """Let the mask code of models serve the implementation ``name``, which runs ``host``.

    A plain causal mask, with or without padding, becomes a `TextMask`; anything else (packed sequences, sliding
    windows, two-way attention) is the host's own mask.
    """
    build = ALL_MASK_ATTENTION_FUNCTIONS[host]

    def mask(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("attention_mask")
        plain = kwargs.get("mask_function") is causal_mask_function and kwargs.get("local_size") is None
        # A cache that counts on the device cannot say how long the text is; only the latest columns matter to it.
        whole = tokens is None or isinstance(kwargs["q_offset"], Tensor) or tokens.shape[-1] == kwargs["kv_length"]
        return TextMask(tokens, lambda: build(*args, **kwargs)) if plain and whole else build(*args, **kwargs)

    AttentionMaskInterface.register(name, mask)


def _rearranged(tensor: Tensor, order: Tensor) -> Tensor:
    return tensor.gather(2, order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
