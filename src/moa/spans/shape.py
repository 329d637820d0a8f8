"""What a plan must know about a model: layers, heads, head width, and which layers have a window of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class ModelShape:
    """The attention of a decoder.

    Attributes:
        layers: decoder layers.
        query_heads: query heads of a layer.
        kv_heads: key and value heads of a layer.
        head_dim: width of one head.
        windows: per layer the tokens of its own sliding window, or None where it sees everything.
        context: the longest text the model was made for, None if it does not say.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    context: int | None

    @classmethod
    def of(cls, model_or_config: Any) -> ModelShape:
        """Read a model or its configuration.

        Raises:
            ValueError: a layer that is neither full nor sliding attention, latent attention, or heads that cannot be
                grouped.
        """
        config = getattr(model_or_config, "config", model_or_config)
        config = config.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None):
            raise ValueError(f"{config.model_type}: latent attention has no KV heads that could have spans")
        layers, query_heads = config.num_hidden_layers, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
        if query_heads % kv_heads:
            raise ValueError(f"{config.model_type}: {query_heads} query heads cannot share {kv_heads} KV heads evenly")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
        context = getattr(config, "max_position_embeddings", None)
        return cls(layers, query_heads, kv_heads, head_dim, _windows(config, layers), context)

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * layers
    for layer, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            raise ValueError(f"{config.model_type}: layer {layer} is {kind!r}; spans need {FULL!r} or {SLIDING!r}")
    return tuple(window if kind == SLIDING else None for kind in types)
