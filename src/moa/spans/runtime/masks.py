"""What a model's mask code hands to attention under a plan: which columns are tokens, instead of a mask of all pairs.

Registered with transformers for every host implementation. A plain causal mask, with or without padding, stays this
small object; anything else (packed sequences, sliding windows, two-way attention) is the host's own mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function

from moa.spans.runtime.columns import Masks


class TextMask:
    """Causal attention of a text.

    Args:
        tokens: ``(batch, columns)``, false for padding; None if there is none.
        host: makes the host's mask.
    """

    def __init__(self, tokens: Tensor | None, host: Callable[[], Any]) -> None:
        self.tokens = None if tokens is None or bool(tokens.all()) else tokens
        self._host = host
        self._latest: dict[int, Tensor | None] = {}
        self.prepared: Masks = {}  # of the forward that this is made for

    @cached_property
    def dense(self) -> Any:
        """The host implementation's mask of all pairs."""
        return self._host()

    def latest(self, columns: int) -> Tensor | None:
        """Which of the latest columns are tokens, ``(batch, columns)``; None if all are."""
        if self.tokens is not None and columns not in self._latest:  # once for all layers
            found = self.tokens[:, -columns:]
            self._latest[columns] = None if bool(found.all()) else found
        return self._latest.get(columns)


def host_mask(mask: Any) -> Any:
    """The mask as the host implementation knows it."""
    return mask.dense if isinstance(mask, TextMask) else mask


def register(name: str, host: str) -> None:
    """Let the mask code of models serve the implementation ``name``, which runs ``host``."""
    build = ALL_MASK_ATTENTION_FUNCTIONS[host]

    def mask(*args: Any, **kwargs: Any) -> Any:
        def dense() -> Any:
            return build(*args, **kwargs)

        tokens = kwargs.get("attention_mask")
        plain = kwargs.get("mask_function") is causal_mask_function and kwargs.get("local_size") is None
        plain = plain and (tokens is None or tokens.shape[-1] == kwargs["kv_length"])
        return TextMask(tokens, dense) if plain else dense()

    AttentionMaskInterface.register(name, mask)
