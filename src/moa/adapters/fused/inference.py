"""A whole block without gradients: few calls, nothing copied, and no expert computed that no token chose."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from moa.adapters.fused.elementwise import rms_norm, rotate, wide
from moa.adapters.fused.prepared import FastRouter, Group, Prepared, PreparedBlocks, Write
from moa.adapters.fused.training import attention

FEW_TOKENS = 16  # up to here a rule that selects is faster on numbers than on tensors; measured with 8 and 32

Gate: TypeAlias = float | Tensor | None
"""One expert's gate: a number for a single token, (n, 1) for several, None if no token chose it."""


def forward(prepared: Prepared, kept: PreparedBlocks, gates: list[Gate], arguments: dict[str, Any]) -> Tensor:
    """The block's output (batch, tokens, hidden).

    Args:
        prepared: the block's weights.
        kept: where they are kept.
        gates: one per router output; not read if the experts are not gated.
        arguments: what the block was called with, by name.
    """
    hidden = arguments["hidden_states"]
    h = hidden.reshape(-1, hidden.shape[-1])
    first, second = prepared.norms
    query, key, value = project(rms_norm(h, *first), prepared.qkv, gates)
    output = attend(prepared, kept, query, key, value, gates, arguments)
    h = project(output, prepared.output, gates)[0].add_(h)
    x = rms_norm(h, *second)
    gate, up = project(x, prepared.inner, gates)
    y = project(F.silu(gate, inplace=True).mul_(up), prepared.down, gates)[0]
    if prepared.parallel is not None:
        beside(y, x, prepared.parallel, gates)
    return y.add_(h).view(hidden.shape)


def route(router: FastRouter, hidden: Tensor) -> list[Gate]:
    """Gates for the block's input (batch, tokens, hidden)."""
    first = router.read(hidden.reshape(-1, hidden.shape[-1])).to(router.dtype)
    logits, end = first[:, : router.outputs], router.outputs
    if router.write is not None:
        end = 2 * router.hidden
        logits = router.write(F.silu(first[:, : router.hidden]).mul_(first[:, router.hidden : end]))
    threshold = first[:, end:] if router.gating.learns_threshold else None
    if logits.device.type == "cpu" and (len(logits) == 1 or (router.gating.selects and len(logits) <= FEW_TOKENS)):
        thresholds = [None] * len(logits) if threshold is None else threshold[:, 0].tolist()
        rows = [router.gating.of_token(row, t) for row, t in zip(logits.tolist(), thresholds, strict=True)]
        return columns_of_numbers(rows, hidden)
    return columns_of(router.gating(logits, threshold).weights.to(hidden.dtype), router.gating.selects)


def columns_of_numbers(rows: list[list[float]], like: Tensor) -> list[Gate]:
    """Gates by token and column -> one `Gate` per column, in the dtype of ``like``."""
    if len(rows) == 1:
        return [gate or None for gate in rows[0]]
    columns = torch.tensor(rows, dtype=like.dtype).unsqueeze(-1).unbind(1)
    return [column if any(gates) else None for column, gates in zip(columns, zip(*rows, strict=True), strict=True)]


def columns_of(gates: Tensor, selects: bool) -> list[Gate]:
    """Gates (n, columns) -> one `Gate` per column.

    Whether some token chose an expert is asked on CPU only: elsewhere the answer would cost more than the expert.
    """
    on_cpu = gates.device.type == "cpu"
    if on_cpu and gates.shape[0] == 1:
        return [gate or None for gate in gates[0].tolist()]
    columns: list[Gate] = list(gates.unsqueeze(-1).unbind(1))
    if on_cpu and selects:
        return [column if some else None for column, some in zip(columns, gates.any(0).tolist(), strict=True)]
    return columns


def project(x: Tensor, group: Group, gates: list[Gate]) -> list[Tensor]:
    """Projections of ``x`` (n, in), with their updates added in place."""
    outputs = [layer(x) for layer in group.layers]
    if group.read is None or not any(chosen(write, gates) for write in group.writes):
        return outputs
    low = group.read(x)
    start = 0
    ranks = iter(group.ranks)
    for y, write in zip(outputs, group.writes, strict=True):
        if write is not None:
            rank = next(ranks)
            add(y, low if rank == low.shape[1] else low[:, start : start + rank], write, gates)
            start += rank
    return outputs


def chosen(write: Write | None, gates: list[Gate]) -> bool:
    return write is not None and (write.column is None or gates[write.column] is not None)


def add(y: Tensor, low: Tensor, write: Write, gates: list[Gate]) -> None:
    """``y += gate * (low matrix)`` in place."""
    gate = 1.0 if write.column is None else gates[write.column]
    if isinstance(gate, float):
        y.addmm_(low, write.matrix, alpha=gate)
    elif gate is not None:
        y.addmm_(low * gate, write.matrix)


def attend(
    prepared: Prepared,
    kept: PreparedBlocks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Gate],
    arguments: dict[str, Any],
) -> Tensor:
    """Attention over text and prompt, (n, heads * width), for projections (n, heads * width)."""
    module = prepared.attention
    shape = (*arguments["hidden_states"].shape[:2], -1, module.head_dim)
    query, key = q.view(shape), k.view(shape)
    if "q_norm" in module._modules:
        query, key = module.q_norm(query), module.k_norm(key)
    heads = query.shape[2]
    both = rotate(torch.cat((query, key), dim=2), *kept.angles(*arguments["position_embeddings"]))
    query, key = both[:, :, :heads], both[:, :, heads:]
    if prepared.is_sdpa and shape[1] == 1 and shape[3] <= 256 and arguments.get("attention_mask") is None:
        output = attend_one(module, query, key, v.view(shape), arguments)
    else:
        output = attention(module, prepared.attend, query, key, v.view(shape), arguments).reshape(q.shape[0], -1)
    gate = 1.0 if prepared.prompt_column is None else gates[prepared.prompt_column]
    if prepared.prompt is None or gate is None:
        return output
    prompt_key, prompt_value = prepared.prompt
    scores = torch.bmm(prompt_key, query.reshape(q.shape[0], heads, -1).permute(1, 2, 0))
    shares = torch.softmax(wide(scores), dim=1).to(q.dtype)
    if not isinstance(gate, float):
        shares, gate = shares.mul_(gate.view(1, 1, -1)), 1.0
    output.view(q.shape[0], heads, -1).transpose(0, 1).baddbmm_(shares.transpose(1, 2), prompt_value, alpha=gate)
    return output


def attend_one(module: Any, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What transformers' SDPA function does for one token per row without a mask, (batch, heads * width)."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    past = arguments.get("past_key_values")
    if past is not None:
        key, value = past.update(key, value, module.layer_idx)
    grouped = module.num_key_value_groups > 1
    output = F.scaled_dot_product_attention(query, key, value, scale=module.scaling, enable_gqa=grouped)
    return output.reshape(output.shape[0], -1)


def beside(y: Tensor, x: Tensor, parallel: tuple[Any, Write, Tensor], gates: list[Gate]) -> None:
    """Add a parallel adapter's output for ``x`` to ``y``, both (n, hidden)."""
    read, write, bias = parallel
    if not chosen(write, gates):
        return
    add(y, F.silu(read(x), inplace=True), write, gates)
    gate = 1.0 if write.column is None else gates[write.column]
    if isinstance(gate, float):
        y.add_(bias, alpha=gate)
    else:
        y.addcmul_(gate, bias)
