"""Kinds whose update is a bottleneck, ``scaling * U (w * act(D x + b)) + w c``, and the fast ways to compute it.

A kind says its `Factors` and is done. Copies lie side by side in one wider bottleneck, their weights differing from
block to block of its width, so that a mixture of eight LoRAs is still two products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa import _hosts
from moa.adapters.context import Forward, Reading, first_argument
from moa.adapters.experts.base import ExpertLayer, as_tensor
from moa.adapters.experts.forms import Bottleneck, Reads
from moa.adapters.low_rank import Part, read, tiled, weighted, widen, write


class UpProjection(nn.Module):
    """A second matrix: weight (out, copies * size) and one bias (copies, out) per copy. All zero: no output."""

    def __init__(self, size: int, out_features: int, copies: int, init_weights: bool):
        super().__init__()
        draw = torch.zeros if init_weights else torch.randn
        self.weight = nn.Parameter(draw(out_features, copies * size) * 0.02)
        self.bias = nn.Parameter(draw(copies, out_features) * 0.02)

    def forward(self, inner: Tensor, weights: Tensor | None) -> Tensor:
        """(..., copies * size), weighted, and the weights (..., copies), (..., 1) or None -> (..., out)."""
        return F.linear(inner, self.weight) + self.biases(weights, inner.dtype)

    def biases(self, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weighted sum of the copies' biases, (..., out) or (out,)."""
        bias = self.bias.to(dtype)
        if weights is None:
            return bias.sum(0)
        return torch.matmul(weights.expand(*weights.shape[:-1], len(bias)), bias)


class Factors(NamedTuple):
    """A bottleneck of one adapter.

    Attributes:
        first: a linear layer to copies * size, or to size if the copies share it.
        second: a linear layer without bias from copies * size, or an `UpProjection`.
        activation: in between, or None.
        scaling: a factor on what the linear layer puts out.
        dropout: on the input, or None.
    """

    first: nn.Linear
    second: nn.Linear | UpProjection
    activation: Callable[[Tensor], Tensor] | None = None
    scaling: float = 1.0
    dropout: nn.Module | None = None


class Quick:
    """One bottleneck of one copy, for a few tokens: two products, and hardly any Python.

    What it keeps are views of the weights, in the layout that products want: whatever changes a weight in place shows
    in them. Weights that were put elsewhere no longer `fit`.
    """

    def __init__(self, factors: Factors, output: int | None, part: Part | None):
        self.modules = (factors.first, factors.second)
        self.first, self.second = (_hosts.parameters(module) for module in self.modules)
        self.down, self.up = (own["weight"].detach().t() for own in (self.first, self.second))  # type: ignore[union-attr]
        self.activation = getattr(factors.activation, "forward", factors.activation)
        self.output = output
        self.part = part

    def fits(self, x: Tensor) -> bool:
        """Whether weights have the dtype that is computed in, and their modules would use them and do nothing more."""
        return (
            self.down.dtype is self.up.dtype is (torch.float64 if x.dtype is torch.float64 else torch.float32)
            and self.down.data_ptr() == self.first["weight"].data_ptr()  # type: ignore[union-attr]
            and self.up.data_ptr() == self.second["weight"].data_ptr()  # type: ignore[union-attr]
            and not _hosts.is_watched(*self.modules)
        )

    def add_to(self, y: Tensor, x: Tensor, now: Forward, adapter: str, scaling: float) -> Tensor:
        """``y += gate * scaling * (U act(D x + b) + c)`` in place."""
        rows, bias = now.rows(x), self.first.get("bias")
        inner = torch.mm(rows, self.down) if bias is None else torch.addmm(bias, rows, self.down)
        if self.activation is not None:
            inner = self.activation(inner)
        gate, bias = now.gate(adapter, self.output, inner), self.second.get("bias")
        if isinstance(gate, float):
            scaling *= gate
        elif gate is not None and bias is None:
            inner = inner * gate
        place = y if self.part is None else self.part.of(y)
        if bias is None and y.dtype is rows.dtype and y.is_contiguous() and place.dim() == y.dim():
            place.view(rows.shape[0], -1).addmm_(inner, self.up, alpha=scaling)
            return y
        delta = torch.mm(inner, self.up) if bias is None else torch.addmm(bias, inner, self.up)
        if isinstance(gate, Tensor) and bias is not None:
            delta = delta * gate
        place.add_(delta.view(place.shape), alpha=scaling)
        return y


class BottleneckLayer(ExpertLayer):
    """An expert that says its `Factors`.

    Attributes:
        reads: what the expert reads; an input of a module that comes before the host is noted when that is called.
        readers: experts (and the router) that are likely to read the same input as this one, itself among them.
        quick: adapter -> the `Quick` that last served few tokens.
    """

    reads: Reads = Reads.INPUT
    readers: Sequence[BottleneckLayer] = ()
    scaling: Mapping[str, float] = {}

    def hook(self) -> None:
        self.quick: dict[str, Quick] = {}
        super().hook()
        if self.reads is not Reads.OUTPUT and self.place.source is not self.host:
            self.reads = Reads.SOURCE
            self.add_hook(self.place.source, before=self._before_source)

    def _before_source(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.context.forward is not None:
            self.context.forward.notes[id(self)] = first_argument(args, kwargs)

    def input_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        if self.reads is Reads.INPUT:
            return first_argument(args, kwargs)
        if self.reads is Reads.OUTPUT:
            return y
        noted: Tensor = self.context.now.notes[id(self)]
        return noted

    @property
    def in_features(self) -> int:
        return self.place.out_features if self.reads is Reads.OUTPUT else self.place.in_features

    @property
    def reads_share(self) -> bool:
        return self.writes_share if self.reads is Reads.OUTPUT else super().reads_share

    def factors(self, adapter: str) -> Factors:
        """The adapter's bottleneck."""
        raise NotImplementedError

    def form(self, adapter: str) -> Bottleneck:
        factors = self.factors(adapter)
        up = factors.second.weight.t() * factors.scaling  # type: ignore[operator]
        width, biases = len(up), 0
        if isinstance(factors.second, UpProjection):
            biases = len(factors.second.bias)
            up = torch.cat([up, factors.second.bias])
        first = factors.first
        return Bottleneck(
            self.reads, first.weight, first.bias, factors.activation, widen(up, self.place.part), width, biases
        )

    def update(self, adapter: str, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """By calling the layers, as offloading and ZeRO want it; out of place."""
        factors = self.factors(adapter)
        x = x if factors.dropout is None else factors.dropout(x)
        if self.reads_share:
            low = self._biased(factors, self._summed(F.linear(x, factors.first.weight)))
        else:
            low = factors.first(x)
        inner = self._spread(self._inner(factors, low, weights))
        if isinstance(factors.second, UpProjection):
            return factors.second(inner, None if weights is None else self._spread(weights))  # type: ignore[no-any-return]
        return factors.second(inner * factors.scaling)  # type: ignore[no-any-return]

    def apply_to(self, now: Forward, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        if now.few and (quick := self._quick(adapter, x)) is not None:
            return quick.add_to(y, x, now, adapter, self.scaling.get(adapter, 1.0))
        factors = self.factors(adapter)
        if torch.compiler.is_compiling() or _hosts.is_watched(factors.first, factors.second):
            return super().apply_to(now, adapter, x, y)
        if now.few:
            return self._few_tokens(now, adapter, factors, x, y)
        return self._many_tokens(now, adapter, factors, x, y)

    def _many_tokens(self, now: Forward, adapter: str, factors: Factors, x: Tensor, y: Tensor) -> Tensor:
        weights = as_tensor(self.weights(now, adapter, x), x)
        if factors.dropout is None:
            readers = [reader for layer in self.readers for reader in layer.reader(adapter)]
            (low,) = now.read((id(self), adapter), x, readers, y.dtype)
        else:
            (low,) = read(factors.dropout(x), [factors.first.weight], y.dtype)
        weights = None if weights is None else weights.to(low.dtype)
        low = self._biased(factors, self._summed(low))
        inner, scaling = self._inner(factors, low, weights), factors.scaling
        matrix: Tensor = factors.second.weight  # type: ignore[assignment]
        if isinstance(factors.second, UpProjection):  # biases as further columns, to pass over y once
            bias = factors.second.bias
            ones = inner.new_ones(*inner.shape[:-1], len(bias)) if weights is None else weights
            inner = torch.cat([inner, ones.expand(*inner.shape[:-1], len(bias))], dim=-1)
            matrix = torch.cat([matrix, bias.t()], dim=1)
        return write(y, self._spread(inner), matrix, scaling, self.place.part)

    def _summed(self, low: Tensor) -> Tensor:
        """What the first matrix made of ``x``, if that is a share of the features: the sum over processes."""
        return self.split.summed(low) if self.split is not None and self.reads_share else low

    def _spread(self, inner: Tensor) -> Tensor:
        """What the second matrix makes this process's share of the output of, if the output is split."""
        return self.split.spread(inner) if self.split is not None and self.split.writes_share else inner

    @staticmethod
    def _biased(factors: Factors, low: Tensor) -> Tensor:
        return low if factors.first.bias is None else low + factors.first.bias.to(low.dtype)

    def _few_tokens(self, now: Forward, adapter: str, factors: Factors, x: Tensor, y: Tensor) -> Tensor:
        """In float32 or wider, in place."""
        wide = now.wide(x)
        weights = as_tensor(self.weights(now, adapter, wide), wide)
        first, second = factors.first, factors.second
        inner = F.linear(wide, first.weight.to(wide.dtype), None if first.bias is None else first.bias.to(wide.dtype))
        delta = F.linear(self._inner(factors, inner, weights) * factors.scaling, second.weight.to(wide.dtype))
        if isinstance(second, UpProjection):
            delta = delta + second.biases(weights, delta.dtype)
        own = y if self.place.part is None else self.place.part.of(y)
        own.add_(delta.view(own.shape))
        return y

    def _quick(self, adapter: str, x: Tensor) -> Quick | None:
        """The shortest way for few tokens, if this expert and its input allow it."""
        quick = self.quick.get(adapter)
        if quick is None or not quick.fits(x):
            if self.number_of_copies(adapter) > 1:
                return None
            quick = Quick(self.factors(adapter), self.output[adapter], self.place.part)
            if not quick.fits(x):
                return None
            self.quick[adapter] = quick
        return quick

    def add_adapter(self, adapter: str, *args: Any, **kwargs: Any) -> None:
        self.quick.pop(adapter, None)
        super().add_adapter(adapter, *args, **kwargs)

    def reader(self, adapter: str) -> list[Reading]:
        """Itself as one of `Forward.read`'s readers; empty if it cannot be served beside others."""
        if self._disable_adapters or adapter not in self.output:
            return []
        factors = self.factors(adapter)
        if factors.dropout is not None or _hosts.is_watched(factors.first):
            return []
        return [((id(self), adapter), [factors.first.weight])]

    @staticmethod
    def _inner(factors: Factors, low: Tensor, weights: Tensor | None) -> Tensor:
        inner = low if factors.activation is None else factors.activation(low)
        return weighted(tiled(inner, factors.second.weight.shape[1]), weights)
