"""What MoA is measured against: the same methods in the plain form in which research code writes them.

- `naive_moa`: every expert makes a full-width output that is multiplied by its gate; sparse experts gather the tokens
  that chose them and scatter their outputs back.
- `naive_molora`, `naive_hydralora`: the homogeneous mixtures, one loop over their LoRAs.

They run on Llama models only, share the frozen weights of the base, and compute the same functions as the presets
``soft-moa`` / ``sparse-moa`` (with a frozen threshold), ``molora`` and ``hydralora``.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward, repeat_kv

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
RANK, BOTTLENECK, PROMPT, ROUTER = 8, 16, 10, 4


class LowRank(nn.Module):
    """One LoRA whose B is not zero, so that every path carries numbers."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.a = nn.Linear(layer.in_features, RANK, bias=False)
        self.b = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.normal_(self.b.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Bottleneck(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.down, self.up = nn.Linear(hidden, BOTTLENECK), nn.Linear(BOTTLENECK, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.silu(self.down(x)))


def gated(expert: nn.Module, x: Tensor, gate: Tensor, sparse: bool, like: Tensor) -> Tensor:
    """An expert's full-width output times its gate (batch, tokens), for the tokens that chose it if ``sparse``."""
    x = x.to(next(expert.parameters()).dtype)
    if not sparse:
        return (expert(x) * gate.unsqueeze(-1)).to(like.dtype)
    output = torch.zeros_like(like)
    rows = torch.where(gate)
    output[rows] += (expert(x[rows]) * gate[rows].unsqueeze(-1)).to(like.dtype)
    return output


class NaiveExperts(nn.Module):
    """All trained modules of one block."""

    def __init__(self, block: Any, config: LlamaConfig, sparse: bool):
        super().__init__()
        hidden, self.sparse = config.hidden_size, sparse
        attention = block.self_attn
        self.q, self.k, self.v = (LowRank(getattr(attention, f"{name}_proj")) for name in "qkv")
        self.o, self.down = LowRank(attention.o_proj), LowRank(block.mlp.down_proj)
        self.parallel = Bottleneck(hidden)
        experts = 6 if sparse else 7
        self.w1, self.w3 = nn.Linear(hidden, ROUTER * experts), nn.Linear(hidden, ROUTER * experts)
        self.w2 = nn.Linear(ROUTER * experts, experts)
        if sparse:
            self.threshold = nn.Linear(hidden, 1)
        else:
            self.prompt = nn.Parameter(torch.randn(PROMPT, hidden))
            self.head_gate = nn.Parameter(torch.randn(1, config.num_attention_heads, 1, 1) * 0.1)

    def gates(self, x: Tensor) -> Tensor:
        x = x.to(self.w1.weight.dtype)
        gates = torch.sigmoid(self.w2(F.silu(self.w1(x)) * self.w3(x)))
        if self.sparse:
            gates = gates * (gates >= 0.5 * torch.sigmoid(self.threshold(x)))
        return gates

    def prompt_output(self, attention: Any, query: Tensor) -> Tensor:
        batch, _, length, width = query.shape
        tokens = self.prompt.to(query.dtype)
        key, value = (
            repeat_kv(layer(tokens).view(1, PROMPT, -1, width).transpose(1, 2), attention.num_key_value_groups)
            for layer in (attention.k_proj, attention.v_proj)
        )
        scores = torch.matmul(query, key.transpose(2, 3)) * attention.scaling
        shares = self.head_gate * F.softmax(scores, dim=-1, dtype=torch.float32)
        return torch.matmul(shares.to(query.dtype), value).transpose(1, 2).reshape(batch, length, -1)


def naive_forward(self: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
    """A Llama block with `NaiveExperts`."""
    experts, attention, mlp = self.naive, self.self_attn, self.mlp
    names = ("q", "k", "v", "o", "down", "parallel", "prompt")
    gates = dict(zip(names, experts.gates(hidden_states).unbind(-1), strict=False))

    def with_expert(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        y = layer(x)
        return y + gated(getattr(experts, name), x, gates[name], experts.sparse, y)

    x = self.input_layernorm(hidden_states)
    shape = (*x.shape[:-1], -1, attention.head_dim)
    q, k, v = (with_expert(n, getattr(attention, f"{n}_proj"), x).view(shape).transpose(1, 2) for n in "qkv")
    q, k = apply_rotary_pos_emb(q, k, *arguments["position_embeddings"])
    past = arguments.get("past_key_values")
    if past is not None:
        k, v = past.update(k, v, attention.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    output = function(attention, q, k, v, arguments.get("attention_mask"), dropout=0.0, scaling=attention.scaling)[0]
    output = output.reshape(*x.shape[:-1], -1)
    if not experts.sparse:
        output = output + (experts.prompt_output(attention, q) * gates["prompt"].unsqueeze(-1)).to(output.dtype)
    hidden = hidden_states + with_expert("o", attention.o_proj, output)
    x = self.post_attention_layernorm(hidden)
    y = with_expert("down", mlp.down_proj, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return hidden + y + gated(experts.parallel, x, gates["parallel"], experts.sparse, y)


def naive_moa(base: LlamaForCausalLM, sparse: bool) -> LlamaForCausalLM:
    """Attach to ``base``, whose blocks are changed."""
    for block in base.model.layers:
        block.naive = NaiveExperts(block, base.config, sparse)
        block.forward = types.MethodType(naive_forward, block)
    return base


class NaiveCopies(nn.Module):
    """A frozen linear layer with a softmax mixture of LoRAs, as MoLoRA and HydraLoRA are published."""

    def __init__(self, layer: nn.Linear, copies: int, shared: bool):
        super().__init__()
        self.layer = layer
        self.router = nn.Linear(layer.in_features, copies)
        self.a = nn.ModuleList(nn.Linear(layer.in_features, RANK, bias=False) for _ in range(1 if shared else copies))
        self.b = nn.ModuleList(nn.Linear(RANK, layer.out_features, bias=False) for _ in range(copies))
        for b in self.b:
            nn.init.normal_(b.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        y, wide = self.layer(x), x.to(self.router.weight.dtype)
        route = F.softmax(self.router(wide), dim=-1)
        for i, b in enumerate(self.b):
            a = self.a[min(i, len(self.a) - 1)]
            y = y + (route[..., i : i + 1] * b(a(wide))).to(y.dtype)
        return y


def naive_copies(base: LlamaForCausalLM, copies: int, shared: bool) -> LlamaForCausalLM:
    """Attach to ``base``, whose projections are wrapped."""
    for block in base.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name in TARGETS:
                if hasattr(parent, name):
                    setattr(parent, name, NaiveCopies(getattr(parent, name), copies, shared))
    return base
