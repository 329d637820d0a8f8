"""What a packed block runs: routers, bottlenecks, rescalings and prompts as plain modules with buffers.

All adapters of a block are computed together. Their experts lie side by side in one bottleneck, and the gates of every
adapter that a token does not ask for are zero there: a batch may mix adapters, in any order, without gathering weights.

Shapes: ``n`` tokens, batch and time flattened; ``columns`` of the gates, one per number that a gate multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa.adapters.low_rank import spread, tiled
from moa.adapters.prompt_attention import Prompt
from moa.adapters.routers import RouterLayer
from moa.serving import products


class PackedRouter(nn.Module):
    """A router of one adapter whose first products are computed elsewhere, with those of others that read the same.

    Args:
        layer: the router.
        adapter: whose.
        dtype: of what it reads.
        read: numbers of the features of its input that are here, see `moa.serving.shards.Shard`; None: all.

    Attributes:
        weight: (rows, in), what reads the router's input.
        bias: (rows,).
    """

    weight: Tensor
    bias: Tensor
    weight2: Tensor | None
    bias2: Tensor | None

    def __init__(self, layer: RouterLayer, adapter: str, dtype: torch.dtype, read: Tensor | None = None):
        super().__init__()
        self.gating = layer.gating[adapter]
        self.is_swiglu = adapter in layer.moa_w1
        first = layer.input_layers(adapter)
        self.sizes = [len(one.weight) for one in first]
        wide = torch.promote_types(dtype, torch.float32)
        biases = [one.weight.new_zeros(len(one.weight)) if one.bias is None else one.bias for one in first]
        weight = torch.cat([one.weight for one in first])
        _keep(self, "weight", weight if read is None else weight[:, read], dtype)
        _keep(self, "bias", torch.cat(biases), dtype)
        second = layer.moa_w2[adapter] if self.is_swiglu else None
        _keep(self, "weight2", None if second is None else second.weight, wide)  # type: ignore[arg-type]
        _keep(self, "bias2", None if second is None else second.bias, wide)  # type: ignore[arg-type]

    def forward(self, first: Tensor) -> Tensor:
        """(n, rows) of what `weight` and `bias` make of the input -> weights (n, experts), in float32 or wider."""
        first = first.to(torch.promote_types(first.dtype, torch.float32))
        parts = list(first.split(self.sizes, dim=-1))
        threshold = parts.pop() if self.gating.learns_threshold else None
        logits = parts[0]
        if self.is_swiglu:
            assert self.weight2 is not None
            logits = products.read(F.silu(parts[0]) * parts[1], self.weight2, self.bias2)
        weights: Tensor = self.gating(logits, threshold).weights
        return weights


Total: TypeAlias = Callable[[Tensor], Tensor]
"""The sum of all processes' tensors, see `moa.serving.shards.Processes`."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None, total: Total | None) -> Tensor:
    """``x W^T + b``, (n, rows); given ``total``, ``x`` and ``W`` are one process's part of the features."""
    if total is None:
        return products.read(x, weight, bias)
    low = total(products.read(x, weight))
    return low if bias is None else low + bias


class Placed(NamedTuple):
    """A form with what gates it.

    Attributes:
        form: the expert's.
        column: which of the block's gates multiplies it.
        copies: the router over its copies, or None.
        total: sums what is made of its input, of which a part is here; None: all of it is.
    """

    form: Any
    column: int
    copies: PackedRouter | None
    total: Total | None


class PackedBottlenecks(nn.Module):
    """All bottlenecks of one host that read the same, as two products.

    Attributes:
        down: (rows, in): every expert's, and the routers over their copies.
        down_bias: (rows,), or None.
        up: (width, out).
        columns: of the block's gates, one per row of ``up``.
        total: as in `Placed`, the same for all.
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    span: tuple[int, int]

    def __init__(self, experts: Sequence[Placed], dtype: torch.dtype):
        super().__init__()
        self.columns = [expert.column for expert in experts for _ in expert.form.up]
        self.total = experts[0].total
        self.runs: list[_Run] = []
        self.sizes: list[int] = []
        routers: list[nn.Module] = []
        rows: list[Tensor] = []
        biases: list[Tensor | None] = []
        for form, _, copies, _ in experts:
            rows.append(form.down)
            biases.append(form.down_bias)
            if form.activation is None and copies is None and not form.biases:
                self._lengthen(len(form.down))
            else:
                self.runs.append(
                    _Run(form.activation, form.width, form.biases, None if copies is None else len(routers))
                )
                self.sizes.append(len(form.down))
            if copies is not None:
                routers.append(copies)
                rows.append(copies.weight)
                biases.append(copies.bias)
                self.sizes.append(len(copies.weight))
        self.copies = nn.ModuleList(routers)
        _keep(self, "down", torch.cat([row.to(dtype) for row in rows]), dtype)
        _keep(self, "down_bias", _biases(rows, biases), dtype)
        _keep(self, "up", torch.cat([expert.form.up for expert in experts]), dtype)

    def _lengthen(self, rows: int) -> None:
        """Plain neighbours, with nothing between their matrices, are one run."""
        if self.runs and self.runs[-1] == _Run(None, self.sizes[-1], 0, None):
            rows += self.sizes.pop()
            self.runs.pop()
        self.runs.append(_Run(None, rows, 0, None))
        self.sizes.append(rows)

    def read(self, x: Tensor) -> Tensor:
        """What ``down`` makes of the input (n, in), (n, rows)."""
        return product(x, self.down, self.down_bias, self.total)

    def forward(self, y: Tensor, low: Tensor, gates: Tensor | None) -> Tensor:
        """Add to ``y`` (n, out), given ``low`` (n, rows), see `read`, and gates (n, width) or None."""
        parts = iter((low,) if len(self.sizes) == 1 else low.split(self.sizes, dim=-1))
        inner = [self._inner(run, parts) for run in self.runs]
        wide = inner[0] if len(inner) == 1 else torch.cat(inner, dim=-1)
        return products.add(y, wide if gates is None else wide * gates, self.up)

    def _inner(self, run: _Run, parts: Iterator[Tensor]) -> Tensor:
        """What is between the matrices of one run, (n, width + biases), weighted by the router over its copies."""
        low = next(parts)
        inner = tiled(low if run.activation is None else run.activation(low), run.width)
        if run.biases:
            inner = F.pad(inner, (0, run.biases), value=1.0)
        if run.router is not None:
            route = self.copies[run.router](next(parts)).to(inner.dtype)
            weights = spread(route, run.width)
            inner = inner * (torch.cat([weights, route], dim=-1) if run.biases else weights)
        return inner


class _Run(NamedTuple):
    """What happens between the matrices of one expert, or of neighbours for whom nothing does."""

    activation: Callable[[Tensor], Tensor] | None
    width: int
    biases: int
    router: int | None


class PackedRescaling(nn.Module):
    """One (IA)^3 expert.

    Attributes:
        change: (copies, features), in float32 or wider: in bfloat16, ``1 + change`` would lose what was learned.
    """

    change: Tensor

    def __init__(self, expert: Placed, dtype: torch.dtype):
        super().__init__()
        self.of_input = expert.form.of_input
        self.total = expert.total
        self.copies = expert.copies
        self.columns = [expert.column]
        _keep(self, "change", expert.form.change, torch.promote_types(dtype, torch.float32))

    def forward(self, y: Tensor, read: Tensor, gates: Tensor | None) -> Tensor:
        """``y`` (n, features) rescaled, given what the host reads (n, in) and gates (n, 1) or None."""
        weights = None if gates is None else gates.to(self.change.dtype)
        if self.copies is not None:
            first = product(read, self.copies.weight, self.copies.bias, self.total)
            route = self.copies(first).to(self.change.dtype)
            weights = route if weights is None else weights * route
        change = self.change.sum(0) if weights is None else weights @ self.change
        return (y * (1 + change)).to(y.dtype)


class PackedPrompt(nn.Module):
    """One prompt expert, with its keys and values.

    Attributes:
        key, value, head_gate: see `moa.adapters.prompt_attention.Prompt`.
    """

    key: Tensor
    value: Tensor
    head_gate: Tensor

    def __init__(self, expert: Placed, dtype: torch.dtype):
        super().__init__()
        self.copies = expert.copies
        self.columns = [expert.column]
        _keep(self, "key", expert.form.key, dtype)
        _keep(self, "value", expert.form.value, dtype)
        _keep(self, "head_gate", expert.form.head_gate, torch.promote_types(dtype, torch.float32))

    def forward(
        self, output: Tensor, query: Tensor, scaling: float | None, attended: Tensor | None, gates: Tensor | None
    ) -> Tensor:
        """Add to the attention interface's ``output``, whatever its shape, tokens first and then heads.

        Args:
            output: of the text's own attention.
            query: (batch, heads, tokens, width).
            scaling: of the scores; None: the usual one.
            attended: what attention read, (batch, tokens, features); only a router over copies asks for it.
            gates: (n, 1), or None.
        """
        weights = gates
        if self.copies is not None:
            assert attended is not None
            route = self.copies(products.read(attended.flatten(0, -2), self.copies.weight, self.copies.bias))
            weights = route if gates is None else gates * route
        if weights is not None:
            weights = weights.view(query.shape[0], query.shape[2], -1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        added = products.attend(query, Prompt(self.key, self.value, self.head_gate), scale, weights)
        return output + added.to(output.dtype).reshape(output.shape)


def _biases(rows: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """One bias for all rows, None if nobody has one."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat([row.new_zeros(len(row)) if b is None else b.to(row) for row, b in zip(rows, biases, strict=True)])


def _keep(module: nn.Module, name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
    """A buffer that is no part of the state dict: it is made of weights that are."""
    kept = None if tensor is None else tensor.detach().to(dtype, copy=True).contiguous()
    module.register_buffer(name, kept, persistent=False)
