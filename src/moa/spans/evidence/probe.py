"""The attention function that measures influence: one registered function, no forward of any family is touched.

For one head and row ``i`` with weights ``A`` and ``g = dL/dA``, taking entry ``j`` out and renormalising the row
changes the loss to first order by

    E[i, j] = -A[i, j] / (1 - A[i, j]) * (g[i, j] - sum_n g[i, n] A[i, n])        (arXiv 2406.14909, equation 3)

Forward is torch's own where that can do it, and keeps queries, keys and values only. Backward computes the weights of
some rows of one head again, in float32, and sums ``E`` over blocks on the spot: no N x N matrix is ever made,
and where attention is causal nothing of its upper right is computed.

Limits: one text per forward and no padding; self-attention only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer as Block

NAME = "moa-influence"
ROWS = 512  # at a time: few enough to leave out most of a causal upper right, enough for products to run at full speed


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

    def add(self, layer: int, head: int, start: int, effect: Tensor) -> None:
        """Add rows of one query head's influence to KV head ``head``; tokens past ``length`` are left out.

        Args:
            layer: whose.
            head: of the KV heads.
            start: the first row's token, at the start of a block.
            effect: (rows, keys) from the first key on; consumed.
        """
        effect = effect[: self.length - start, : self.length]
        first = start // self.block
        for total, sums in ((self.signed, self._blocks(effect)), (self.absolute, self._blocks(effect.abs_()))):
            total[layer, head, first : first + len(sums), : sums.shape[1]] += sums
        self.seen.add(layer)

    def _blocks(self, effect: Tensor) -> Tensor:
        missing = [-size % self.block for size in effect.shape]
        padded = pad(effect, (0, missing[1], 0, missing[0])) if any(missing) else effect
        return padded.unflatten(1, (-1, self.block)).unflatten(0, (-1, self.block)).sum((1, 3)).cpu()

    def rows(self, length: int) -> list[slice]:
        """Some `ROWS` of ``length`` at a time, whole blocks."""
        step = max(ROWS // self.block, 1) * self.block
        return [slice(start, min(start + step, length)) for start in range(0, length, step)]


_sums: ContextVar[BlockSums | None] = ContextVar("influence sums", default=None)


@contextmanager
def probing(model: Any, sums: BlockSums) -> Iterator[None]:
    """Inside, ``model`` attends through the probe and its backward fills ``sums``; no parameter gets a gradient.

    Blocks keep their inputs alone and are read once more on the way back: a text then needs little more memory than its
    longest block does.
    """
    before = model.config._attn_implementation
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training, token = model.training, _sums.set(sums)
    # Without a trainable parameter autograd would not start; the embedding's output is where it starts instead.
    start = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    blocks = [(block, vars(block).get("forward")) for block in model.modules() if isinstance(block, Block)]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        model.set_attn_implementation(NAME)
        for block, _ in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block, own in blocks:
            vars(block).pop("forward", None)
            if own is not None:
                block.forward = own
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
    head_of = _Head.of(query, attention_mask, options)
    output = _Probe.apply(query, key, value, head_of, sums, module.layer_idx)
    return output.transpose(1, 2).contiguous(), None


class _Head(NamedTuple):
    """What a head's scores are made of, beside queries and keys.

    Attributes:
        mask: (N, N) bool, True where a query sees, or numbers to add to the scores; None: itself and all before it.
        scaling: of the scores.
        softcap: bound of the scores, None for none.
        sinks: (query heads,) logits of a column that nobody attends to, None for none.
    """

    mask: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None

    @classmethod
    def of(cls, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> _Head:
        own = None if mask is None else mask[0, 0, :, : query.shape[2]]
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        return cls(own, scaling, options.get("softcap"), options.get("s_aux"))

    def keys(self, rows: slice) -> slice:
        """What any of the queries in ``rows`` may look at."""
        return slice(0, rows.stop if self.mask is None else None)

    def visible(self, scores: Tensor, rows: slice) -> Tensor:
        """The mask's part for ``scores`` (rows, keys)."""
        if self.mask is None:
            return torch.ones_like(scores, dtype=torch.bool).tril_(rows.start)
        return self.mask[rows]

    def weights(self, q: Tensor, k: Tensor, head: int, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Float32 weights (rows, keys) of a head's (N, size) queries and keys, and the soft cap's slope, if any."""
        scores, slope = (q[rows] @ k[self.keys(rows)].T).float().mul_(self.scaling), None
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap)
            slope = 1 - scores.square()
            scores = scores * self.softcap
        visible = self.visible(scores, rows)
        if visible.dtype == torch.bool:
            scores.masked_fill_(~visible, float("-inf"))
        else:
            scores = scores + visible
        if self.sinks is None:
            return torch.softmax(scores, -1), slope
        sink = self.sinks[head].float().expand(len(scores), 1)
        return torch.softmax(torch.cat([scores, sink], -1), -1)[:, :-1], slope


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, head_of: _Head, sums: BlockSums, layer: int
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.head_of, ctx.sums, ctx.layer = head_of, sums, layer
        group = query.shape[1] // key.shape[1]
        if head_of.softcap is None and head_of.sinks is None:
            mask = None if head_of.mask is None else head_of.mask[None, None]
            settings = {"is_causal": mask is None, "scale": head_of.scaling, "enable_gqa": group > 1}
            return scaled_dot_product_attention(query, key, value, mask, **settings)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        for head in range(query.shape[1]):
            own = head // group
            for rows in sums.rows(query.shape[2]):
                weights, _ = head_of.weights(query[0, head], key[0, own], head, rows)
                output[0, head, rows] = weights.to(value.dtype) @ value[0, own, head_of.keys(rows)]
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        head_of, sums = ctx.head_of, ctx.sums
        to_query = torch.empty_like(query)
        # summed over rows and over the query heads of a group, in float32 like everything a head's numbers go into
        to_key, to_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            own = head // group
            q, k, v = query[0, head], key[0, own], value[0, own]
            for rows in sums.rows(query.shape[2]):
                keys, output = head_of.keys(rows), gradients[0][0, head, rows]
                weights, slope = head_of.weights(q, k, head, rows)
                to_value[0, own, keys] += weights.to(v.dtype).T @ output
                to_scores, effect = _effect(weights, (output @ v[keys].T).float(), rows.start)
                sums.add(ctx.layer, own, rows.start, effect)
                if slope is not None:
                    to_scores *= slope
                to_scores = (to_scores * head_of.scaling).to(q.dtype)
                to_query[0, head, rows] = to_scores @ k[keys]
                to_key[0, own, keys] += to_scores.T @ q[rows]
        return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None, None, None


def _effect(weights: Tensor, gradient: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """What the loss does, to first order, by a change of each score and by taking out each entry.

    Args:
        weights: (rows, keys) float32.
        gradient: of the loss by the weights; consumed.
        start: the first row's token.

    Returns:
        dL/dscore and the effect of taking an entry out, both (rows, keys).
    """
    first = gradient[0].clone()
    kept = (weights * gradient).sum(-1, keepdim=True)
    to_scores = gradient.sub_(kept).mul_(weights)
    effect = to_scores / (weights - (1 + torch.finfo(weights.dtype).eps))
    # The first row's only entry is 1: there is nothing to renormalise onto, what is lost is its contribution.
    if start == 0:
        effect[0] = -weights[0] * first
    return to_scores, effect


AttentionInterface.register(NAME, probe_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
