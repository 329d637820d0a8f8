"""Starting weights of the long-context organism: positional and matching heads, as rough drafts.

Look-up needs two layers that only pay off together (a head that carries the previous token's identity forward, and a
later one that matches it), which random weights find late: after millions of tokens for so small a model. The start
therefore holds a draft of both, and training has to sharpen it, to spread it over long texts and to learn the rest.

- Layer 0: two of the KV heads look one and two tokens back. Their scores come from one constant dimension of the
  embeddings through the rotary angles; they write the identity of what they see into subspaces of their own.
- Later layers: queries read the identities of the current and the previous token, keys those of the two tokens before
  their own; outputs copy the identity of the token found. Only slowly rotating dimensions take part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

EMBEDDING = 0.1  # standard deviation
CONSTANT = 0.4  # dimension 0 of every embedding
POSITIONAL = 1.8  # of the weights that look back
MATCHING = 3.0  # of the weights that compare identities
COPYING = 0.6  # of the weights that write what was found
FAST, SLOW = 8, 6  # rotary pairs below FAST look back, those from SLOW on compare


@torch.no_grad()
def draft_circuits(model: LlamaForCausalLM, seed: int) -> None:
    """Write the drafts over a freshly built model's weights."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    width, size = config.hidden_size, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, EMBEDDING, generator=generator)
    embedding[:, 0] = 0
    embedding *= EMBEDDING * width**0.5 / embedding.norm(dim=1, keepdim=True)  # equal norms: equal constants below
    embedding[:, 0] = CONSTANT
    basis = torch.zeros(width, width)
    basis[1:, 1:] = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator)).Q
    identities = [basis[1 + i * size : 1 + (i + 1) * size] for i in range(3)]  # now, one back, two back
    first, *later = (layer.self_attn for layer in model.model.layers)
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(FAST) * 2 / size)
    for head in range(2):
        back = head + 1
        own = slice(head * size, (head + 1) * size)
        first.k_proj.weight[own] = 0
        first.k_proj.weight[own][:FAST, 0] = POSITIONAL
        first.v_proj.weight[own] = identities[0]
        for query in range(head * group, (head + 1) * group):
            theirs = slice(query * size, (query + 1) * size)
            weight = first.q_proj.weight[theirs]
            weight.zero_()
            weight[:FAST, 0] = POSITIONAL * torch.cos(-back * angles)
            weight[size // 2 : size // 2 + FAST, 0] = POSITIONAL * torch.sin(-back * angles)
            first.o_proj.weight[:, theirs] = identities[back].T * EMBEDDING / group
    for attention in later:
        for head in range(config.num_key_value_heads):
            own = slice(head * size, (head + 1) * size)
            some = torch.randperm(size, generator=generator)[: size // 2 - SLOW]
            now, before, earlier = (identity[some] for identity in identities)
            attention.k_proj.weight[own] = _slow(before, earlier, size)
            attention.v_proj.weight[own] = identities[0]
            for query in range(head * group, (head + 1) * group):
                theirs = slice(query * size, (query + 1) * size)
                attention.q_proj.weight[theirs] = _slow(now, before, size)
                attention.o_proj.weight[:, theirs] = identities[0].T * COPYING / group


def _slow(one: Tensor, other: Tensor, size: int) -> Tensor:
    """A head's projection `(size, width)` that reads both on its slowly rotating dimensions."""
    weight = torch.zeros(size, one.shape[1])
    weight[SLOW : size // 2] = MATCHING * one
    weight[size // 2 + SLOW :] = MATCHING * other
    return weight
