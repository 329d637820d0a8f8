"""The attention function that measures influence: one registered function, no forward of any family is touched.

For one head and row ``i`` with weights ``A`` and ``g = dL/dA``, taking entry ``j`` out and renormalising the row
changes the loss to first order by

    E[i, j] = -A[i, j] / (1 - A[i, j]) * (g[i, j] - sum_n g[i, n] A[i, n])        (arXiv 2406.14909, equation 3)

Forward keeps queries, keys and values only. Backward computes the weights of one head again, in float32, so that no
more than a few N x N matrices of a single head exist at a time; ``E`` is summed over blocks on the spot.

Limits: one text per forward and no padding; self-attention only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "moa-influence"


class BlockSums:
    """Influence of one text, summed over blocks and over the query heads of each KV head.

    Attributes:
        signed: (layers, KV heads, blocks, blocks) float32 on the CPU; row = query block, column = key block.
        absolute: the same of |E|, taken per entry and query head before summing.
        seen: layers that were measured.
    """

    def __init__(self, layers: int, kv_heads: int, length: int, block: int) -> None:
        self.length, self.block = length, block
        blocks = -(-length // block)
        self.signed = torch.zeros(layers, kv_heads, blocks, blocks)
        self.absolute = torch.zeros_like(self.signed)
        self.seen: set[int] = set()

    def add(self, layer: int, head: int, effect: Tensor) -> None:
        """Add one query head's (N, N) influence to KV head ``head``; tokens past ``length`` are left out."""
        effect = effect[: self.length, : self.length]
        self.signed[layer, head] += self._blocks(effect)
        self.absolute[layer, head] += self._blocks(effect.abs())
        self.seen.add(layer)

    def _blocks(self, effect: Tensor) -> Tensor:
        count = self.signed.shape[-1]
        missing = count * self.block - effect.shape[0]
        padded = pad(effect, (0, missing, 0, missing))
        return padded.reshape(count, self.block, count, self.block).sum((1, 3)).cpu()


_sums: ContextVar[BlockSums | None] = ContextVar("influence sums", default=None)


@contextmanager
def probing(model: Any, sums: BlockSums) -> Iterator[None]:
    """Inside, ``model`` attends through the probe and its backward fills ``sums``; no parameter gets a gradient."""
    before = model.config._attn_implementation
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training, token = model.training, _sums.set(sums)
    # Without a trainable parameter autograd would not start; the embedding's output is where it starts instead.
    start = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)
        start.remove()
        _sums.reset(token)


def probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention by explicit weights, measured on the way back.

    Args:
        module: the attention module; its ``layer_idx`` says which layer this is.
        query: (1, query heads, N, head size).
        key: (1, KV heads, N, head size).
        value: (1, KV heads, N, value size).
        attention_mask: (1, 1, N, N), True where a query may look; None: causal.
        **options: ``scaling``, ``softcap`` and ``s_aux`` (a sink logit per query head) as families pass them.

    Returns:
        (1, N, query heads, value size), and no weights.

    Raises:
        ValueError: more than one text, or keys that are not the queries' own.
    """
    sums = _sums.get()
    if sums is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"influence is measured on one whole text at a time by `moa.spans.evidence.influence`, "
            f"not on queries {tuple(query.shape)} over keys {tuple(key.shape)}"
        )
    weights = _weights(query, attention_mask, options)
    output = _Probe.apply(query, key, value, weights, sums, module.layer_idx)
    return output.transpose(1, 2).contiguous(), None


def _weights(query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Callable[[Tensor, Tensor, int], Tensor]:
    """A function of one head's (N, size) queries and keys and its number to its (N, N) float32 weights."""
    length = query.shape[2]
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if mask is None:
        visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    else:
        visible = mask[0, 0, :, :length]

    def weights(q: Tensor, k: Tensor, head: int) -> Tensor:
        scores = (q @ k.T * scaling).float()
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~visible, float("-inf")) if visible.dtype == torch.bool else scores + visible
        if sinks is None:
            return torch.softmax(scores, -1)
        sink = sinks[head].float().expand(length, 1)
        return torch.softmax(torch.cat([scores, sink], -1), -1)[:, :-1]

    return weights


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, weights: Callable[..., Tensor], sums: BlockSums, layer: int
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.weights, ctx.sums, ctx.layer = weights, sums, layer
        group = query.shape[1] // key.shape[1]
        heads = [
            weights(query[0, head], key[0, head // group], head).to(value.dtype) @ value[0, head // group]
            for head in range(query.shape[1])
        ]
        return torch.stack(heads)[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        to_query, to_key, to_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            own = head // group
            q, k, v = (x.detach().requires_grad_() for x in (query[0, head], key[0, own], value[0, own]))
            with torch.enable_grad():
                weights = ctx.weights(q, k, head)
                output = weights.to(v.dtype) @ v
            wanted = torch.autograd.grad(output, (weights, q, k, v), gradients[0][0, head])
            ctx.sums.add(ctx.layer, own, _effect(weights.detach(), wanted[0]))
            to_query[0, head] = wanted[1]
            to_key[0, own] += wanted[2]
            to_value[0, own] += wanted[3]
        return to_query, to_key, to_value, None, None, None


def _effect(weights: Tensor, gradient: Tensor) -> Tensor:
    """(N, N) first-order loss change of taking out each entry; consumes nothing, returns a new tensor."""
    kept = (weights * gradient).sum(-1, keepdim=True)
    effect = -weights / (torch.finfo(weights.dtype).eps + 1 - weights) * (gradient - kept)
    # The first row's only entry is 1: there is nothing to renormalise onto, what is lost is its contribution.
    effect[0] = -weights[0] * gradient[0]
    return effect


AttentionInterface.register(NAME, probe_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
