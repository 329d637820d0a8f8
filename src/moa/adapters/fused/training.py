"""A whole block with gradients: four autograd functions around the model's own attention."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moa.adapters.attention_interface import host_function
from moa.adapters.fused.attention import AttentionOutput, Prompt
from moa.adapters.fused.elementwise import Rotate, signed
from moa.adapters.fused.mlp import GatedMlp
from moa.adapters.fused.parts import Parts
from moa.adapters.fused.projections import NormProject

NAMED = ("hidden_states", "attention_mask", "past_key_values", "position_embeddings")


def forward(parts: Parts, gates: Tensor | None, arguments: dict[str, Any]) -> Tensor:
    """The block's output (batch, tokens, hidden).

    Args:
        parts: the block, taken apart.
        gates: (n, columns) in the block's dtype, or None if its experts are not gated.
        arguments: what the block was called with, by name.
    """
    block, hidden = parts.block, arguments["hidden_states"]
    norm = block.input_layernorm
    q, k, v = NormProject.apply(
        hidden, norm.weight, norm.variance_epsilon, gates, parts.qkv, *parts.qkv.a, *parts.qkv.b
    )
    query, key, value = split_heads(block.self_attn, q, k, v)
    cos, sin = arguments["position_embeddings"]
    query, key = Rotate.apply(query, key, cos.unsqueeze(2), signed(sin).unsqueeze(2))
    output = attention(block.self_attn, host_function(block.self_attn), query, key, value, arguments)
    prompt = (None, None, None) if parts.prompt is None else tuple(prompt_of(parts, hidden))
    hidden = AttentionOutput.apply(hidden, query, output, gates, parts.output, *prompt, *parts.output_ab)
    norm = block.post_attention_layernorm
    trained = (*parts.parallel, *parts.down_ab, *parts.mlp.inner.a, *parts.mlp.inner.b)
    return GatedMlp.apply(hidden, norm.weight, norm.variance_epsilon, gates, parts.mlp, bool(parts.parallel), *trained)


def split_heads(module: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projections -> (batch, tokens, heads, width) each, normed where the family norms heads."""
    query, key, value = (x.unflatten(-1, (-1, module.head_dim)) for x in (q, k, v))
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    return query, key, value


def attention(
    module: Any, function: Any, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """The model's own attention ``function``, cache and mask, over (batch, tokens, heads, width); the same shape."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    past = arguments.get("past_key_values")
    if past is not None:
        key, value = past.update(key, value, module.layer_idx)
    others = {name: argument for name, argument in arguments.items() if name not in NAMED}
    if "sliding_window" in module.__dict__:
        others["sliding_window"] = module.sliding_window
    elif hasattr(module.config, "sliding_window"):
        others["sliding_window"] = module.config.sliding_window
    dropout = module.attention_dropout if module.training else 0.0
    mask = arguments.get("attention_mask")
    return function(module, query, key, value, mask, dropout=dropout, scaling=module.scaling, **others)[0]


def prompt_of(parts: Parts, hidden: Tensor) -> Prompt:
    """The prompt's keys and values: through the block's frozen projections, neither rotated nor updated."""
    module, weights, biases = parts.block.self_attn, parts.qkv.weights, parts.qkv.biases
    tokens, head_gate = parts.prompt.moa_prompt[parts.adapter]()  # type: ignore[union-attr]
    tokens = tokens.to(hidden.dtype)
    key, value = (F.linear(tokens, weights[i], biases[i]).unflatten(-1, (-1, module.head_dim)) for i in (1, 2))
    if hasattr(module, "k_norm"):
        key = module.k_norm(key)
    return Prompt(key.transpose(0, 1), value.transpose(0, 1), head_gate)
