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
from moa.adapters.context import Forward, Reading
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
    """One bottleneck of one copy, for a few tokens: three products and sums, and hardly any Python.

    It holds the modules' own dictionaries of parameters and none of their tensors: weights are those of the moment.
    """

    def __init__(self, factors: Factors, output: int | None, part: Part | None):
        self.modules = (factors.first, factors.second)
        self.first, self.second = (_hosts.parameters(module) for module in self.modules)
        self.activation = getattr(factors.activation, "forward", factors.activation)
        self.output = output
        self.part = part

    def fits(self, x: Tensor) -> bool:
        """Whether weights have the dtype that is computed in, and lie where their modules say."""
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        if self.first["weight"].dtype is not dtype:  # type: ignore[union-attr]
            return False
        return not (_hosts.is_watched(self.modules[0]) or _hosts.is_watched(self.modules[1]))

    def add_to(self, y: Tensor, x: Tensor, now: Forward, adapter: str, scaling: float) -> Tensor:
        """``y += gate * scaling * (U act(D x + b) + c)`` in place."""
        wide = x if x.dtype is torch.float32 else now.wide(x)
        inner = F.linear(wide, self.first["weight"], self.first.get("bias"))  # type: ignore[arg-type]
        if self.activation is not None:
            inner = self.activation(inner)
        bias = self.second.get("bias")
        delta = F.linear(inner, self.second["weight"], bias if bias is None else bias[0])  # type: ignore[arg-type]
        gate = now.gate(adapter, self.output, wide)
        if isinstance(gate, Tensor):
            delta = delta * gate
        elif gate is not None:
            scaling *= gate
        own = y if self.part is None else self.part.of(y)
        own.add_(delta if delta.shape == own.shape else delta.view(own.shape), alpha=scaling)
        return y


class BottleneckLayer(ExpertLayer):
    """An expert that says its `Factors`.

    Attributes:
        readers: experts (and the router) that are likely to read the same input as this one, itself among them.
        quick: adapter -> how it is computed for few tokens, None if it cannot be computed so.
    """

    readers: Sequence[BottleneckLayer] = ()
    scaling: Mapping[str, float] = {}

    def hook(self) -> None:
        self.quick: dict[str, Quick | None] = {}
        super().hook()

    def factors(self, adapter: str) -> Factors:
        """The adapter's bottleneck."""
        raise NotImplementedError

    @property
    def reads(self) -> Reads:
        """What the expert reads."""
        return Reads.INPUT if self.place.source is self.host else Reads.SOURCE

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
        low = factors.first(x if factors.dropout is None else factors.dropout(x))
        inner = self._inner(factors, low, weights)
        if isinstance(factors.second, UpProjection):
            return factors.second(inner, weights)  # type: ignore[no-any-return]
        return factors.second(inner * factors.scaling)  # type: ignore[no-any-return]

    def apply_to(self, now: Forward, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        if now.few and (quick := self._quick(adapter, x)) is not None:
            return quick.add_to(y, x, now, adapter, self.scaling.get(adapter, 1.0))
        factors = self.factors(adapter)
        if torch.compiler.is_compiling() or _hosts.is_watched(factors.first) or _hosts.is_watched(factors.second):
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
        if factors.first.bias is not None:
            low = low + factors.first.bias.to(low.dtype)
        inner, scaling = self._inner(factors, low, weights), factors.scaling
        matrix: Tensor = factors.second.weight  # type: ignore[assignment]
        if isinstance(factors.second, UpProjection):  # biases as further columns, to pass over y once
            bias = factors.second.bias
            ones = inner.new_ones(*inner.shape[:-1], len(bias)) if weights is None else weights
            inner = torch.cat([inner, ones.expand(*inner.shape[:-1], len(bias))], dim=-1)
            matrix = torch.cat([matrix, bias.t()], dim=1)
        return write(y, inner, matrix, scaling, self.place.part)

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
        if adapter not in self.quick:
            factors = self.factors(adapter)
            bias = _hosts.parameters(factors.second).get("bias")
            plain = self.number_of_copies(adapter) == 1 and (bias is None or len(bias) == 1)
            self.quick[adapter] = Quick(factors, self.output[adapter], self.place.part) if plain else None
        quick = self.quick[adapter]
        return quick if quick is not None and quick.fits(x) else None

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
