"""Tiny models of several families, and the meaning of a plan written down once more, without the code under test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from moa.spans import SpanPlan

SINK = BLOCK = 4
LAYERS, HEADS, KV_HEADS = 2, 4, 2

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "phi3": ("Phi3", {}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 12, "attn_implementation": "eager", "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}),
}


def tiny(family: str = "llama", **config: Any) -> PreTrainedModel:
    """A random model of two blocks in eval mode, the same at every call."""
    name, own = FAMILIES[family]
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    text = "TextConfig" if name == "Gemma3" else "Config"
    given = {
        key: value
        for key, value in {**settings, **own, **config}.items()
        if (key, value) != ("num_key_value_heads", None)
    }
    made = getattr(transformers, name + text)(**given)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name + "ForCausalLM")(made).eval()
    model.generation_config.eos_token_id = None
    return model


def mixed_plan(kv_heads: int = KV_HEADS) -> SpanPlan:
    """Every head another rule: tight, elastic, dense."""
    rules = [(16, 0.0), (0, 0.5), (0, 1.0), (8, 0.0)]
    table = [[rules[(layer * kv_heads + head) % 4] for head in range(kv_heads)] for layer in range(LAYERS)]
    return SpanPlan(
        [[a for a, _ in row] for row in table], [[b for _, b in row] for row in table], sink=SINK, block=BLOCK
    )


def ids(rows: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    """Random tokens without special ones."""
    return torch.randint(5, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def by_definition(model: PreTrainedModel, spans: Sequence[Sequence[int]]) -> Iterator[None]:
    """Dense attention under a mask of all pairs: a token sees the sink and its span's latest tokens, itself included.

    ``spans`` is layers x KV heads. Whole texts only, no padding, no cache. Layers with a window of their own are left.
    """

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        shared = query.shape[1] // key.shape[1]
        row, column = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
        seen = []
        for kept in spans[module.layer_idx]:
            window = getattr(module, "sliding_window", None)
            near = column > row - (window or kept - SINK)
            seen += [(column <= row) & (near if window else near | (column < SINK))] * shared
        scores = query @ key.repeat_interleave(shared, 1).transpose(2, 3) * rest["scaling"]
        if rest.get("softcap"):
            scores = torch.tanh(scores / rest["softcap"]) * rest["softcap"]
        weights = scores.masked_fill(~torch.stack(seen), float("-inf")).softmax(-1)
        return (weights @ value.repeat_interleave(shared, 1)).transpose(1, 2), None

    AttentionInterface.register("by_definition", attention)
    AttentionMaskInterface.register("by_definition", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("by_definition")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def logits(model: nn.Module, tokens: Tensor, **inputs: Any) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(tokens, **inputs).logits


def decoded(model: nn.Module, tokens: Tensor, prefill: int, cache: Any = None, **inputs: Any) -> tuple[Tensor, Any]:
    """Logits of a prefill and one step for every further token, and the cache."""
    parts, start = [], 0
    mask = inputs.get("attention_mask")
    for end in range(prefill, tokens.shape[1] + 1):
        step = {} if mask is None else {"attention_mask": mask[:, :end]}
        if mask is not None:
            step["position_ids"] = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
        with torch.no_grad():
            output = model(tokens[:, start:end], past_key_values=cache, use_cache=True, **step)
        parts.append(output.logits)
        cache, start = output.past_key_values, end
    return torch.cat(parts, 1), cache
