"""How a decoder block carries its router and hands gates to its experts.

The block's class is exchanged for a subclass whose forward opens a `BlockContext`, routes, runs the original forward
and closes the context again. A subclass, and not a hook or a wrapper, because activation checkpointing re-runs
``forward`` of the class: gates computed anywhere else are missing or stale when backward recomputes the block.
Experts are hooks at their places inside; they find their gates in the context.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moa import _hosts
from moa.adapters.architectures import BlockView
from moa.adapters.context import BlockContext, Forward, Gate, Reading, bound_arguments, parameters_of_forward
from moa.adapters.gating import Gates
from moa.adapters.gradients import check_not_packed, four_bit_layers
from moa.adapters.rematerialise import rematerialised
from moa.adapters.routers import Router, RouterLayer
from moa.adapters.running_mean import Text, pool, text_of


class Mixture(RouterLayer):
    """The router of one decoder block, attached to it as ``mixture``, and the context it shares with its experts.

    Attributes:
        index: the block's number.
        blocks: how many the model has.
        router: adapter -> how its decision is made; adapters without a router are missing.
        columns: adapter -> names of its gate columns.
        column_outputs: adapter -> for every column, which of the router's outputs it is.
        auxiliary: adapter -> whether this router, or one over an expert's copies, has an auxiliary loss.
        follows: adapter -> whether that is so in any block of the model, whose loss is then followed.
        beside: experts that read what attention reads, and are served when a router reads it too.
    """

    other_param_names: ClassVar[tuple[str, ...]] = (
        *("gating", "router", "columns", "column_outputs", "auxiliary", "follows"),
    )

    def __init__(self, view: BlockView, blocks: int):
        super().__init__(view.module, view.hidden_size, BlockContext(), view.split)
        self.index = view.index
        self._attention_width = view.attention_width
        self.blocks = blocks
        self.mask_hides = view.architecture.mask_hides
        self.router: dict[str, Router] = {}
        self.columns: dict[str, list[str]] = {}
        self.column_outputs: dict[str, list[int]] = {}
        self.auxiliary: dict[str, bool] = {}
        self.follows: dict[str, bool] = {}
        self.beside: Sequence[Any] = ()
        self.attention = (view.attention,)  # a tuple, so that nn.Module does not register it as a child
        self._streams_first = view.streams_first is True  # all rows are in each of them
        self._four_bit = tuple(four_bit_layers(view.module))
        self._handles: list[Any] = []
        self._parameters_of_attention: list[str] = []
        self._over_text: set[str] = set()  # adapters whose router reads more than a token

    def set_router(self, adapter: str, router: Router, columns: list[str], outputs: list[int]) -> None:
        """How ``adapter`` routes; `add_router` creates the weights. A block without attention is read raw."""
        (attention,) = self.attention
        if attention is None:
            router = replace(router, input="block")
        self.router[adapter] = router
        self._over_text.discard(adapter)
        if router.level != "token":
            self._over_text.add(adapter)
        self.columns[adapter] = columns
        self.column_outputs[adapter] = outputs
        self.hook()

    def hook(self) -> None:
        """Take part in attention's forward, if a router reads what attention reads."""
        (attention,) = self.attention
        wanted = any(router.input == "attention" for router in self.router.values())
        if wanted and not self._parameters_of_attention:
            self._parameters_of_attention = parameters_of_forward(type(attention))
            self.keep(attention.register_forward_pre_hook(self._before_attention, with_kwargs=True))  # type: ignore[union-attr]

    def width(self, router: Router) -> int:
        """Of what attention reads, which in some families is more than the block does."""
        return self._attention_width if router.input == "attention" else self.in_features

    def open(self, hidden: Tensor, parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start a forward of the block on ``hidden`` (batch, tokens, hidden_size), given how the block was called."""
        if self._four_bit and self.host.training and torch.is_grad_enabled():
            check_not_packed(self._four_bit, self.index)
        rows = hidden[0] if self._streams_first else hidden
        now = self.context.open(rows, exact=self.host.training or self.split is not None)
        if self._needs_text(now):
            arguments = bound_arguments(parameters, args, kwargs)
            now.past = _hosts.cache_of(arguments)
            now.tokens, now.starts = text_of(hidden, arguments, self.mask_hides, self.index)
            for group in now.groups or ():
                group.forward.tokens = None if now.tokens is None else group.of(now.tokens.unsqueeze(-1)).squeeze(-1)
        self._route(now, hidden, "block")

    def _before_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self.context.forward
        if now is not None and not now.bypassed:
            self._route(now, attended(self._parameters_of_attention, args, kwargs), "attention")

    def _route(self, now: Forward, features: Tensor, stage: str) -> None:
        if now.groups is None:
            for name in self.enabled(self.router):
                if self.router[name].input == stage:
                    self._decide(now, name, self._pooled(now, name, features))
            return
        for group in now.groups:
            name = group.adapter
            if name in self.router and self.router[name].input == stage:
                read = self._pooled(now, name, features)  # of all rows, as KV caches move them
                with self.context.alone(group) as own:
                    self._decide(own, name, group.input(read))

    def _pooled(self, now: Forward, name: str, features: Tensor) -> Tensor:
        """What an adapter's router reads of ``features`` (batch, tokens, features)."""
        level = self.router[name].level
        if level == "token":
            return features
        return pool(features, level, Text(now.tokens, now.starts), now.past, (self.index, name), self.blocks)

    def _decide(self, now: Forward, name: str, read: Tensor) -> None:
        gates: Gates = self(read, name, now.tokens)
        now.gates[name] = columns_of(gates.weights, read.dtype, now.few)

    def _read(self, features: Tensor, adapter: str, matrices: Sequence[Tensor]) -> list[Tensor]:
        """With everybody who reads the same: what attention reads goes through the first matrices of q, k and v too."""
        router = self.router[adapter]
        if router.input != "attention" or router.level != "token" or torch.compiler.is_compiling():
            return super()._read(features, adapter, matrices)
        me = (id(self), adapter)
        readers: list[Reading] = [(me, list(matrices))]
        for layer in self.beside:
            readers += layer.reader(adapter)
        return self.context.now.read(me, features, readers, features.dtype)

    def keep(self, handle: Any) -> None:
        """Remove a hook's ``handle`` when the mixture is taken off."""
        self._handles.append(handle)

    def _needs_text(self, now: Forward) -> bool:
        if now.groups is not None:
            return any(group.adapter in self._over_text for group in now.groups)
        if self.training and any(self.auxiliary[name] for name in self.enabled(self.auxiliary)):
            return True
        return bool(self._over_text) and bool(self.enabled(self._over_text))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._parameters_of_attention = []


def columns_of(weights: Tensor, dtype: torch.dtype, few: bool) -> Sequence[Gate]:
    """Gates (batch, tokens, outputs), one per output; as numbers where there is a single token on a CPU."""
    if not few:
        return weights.to(dtype).unsqueeze(-1).unbind(-2)
    outputs = weights.shape[-1]
    if weights.numel() == outputs and weights.device.type == "cpu":
        return weights.view(-1).tolist()  # type: ignore[no-any-return]
    return weights.view(-1, outputs, 1).unbind(1)


def attended(parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What an attention module reads, given how it was called."""
    if args:
        kwargs = bound_arguments(parameters, args, kwargs)
    hidden: Tensor = kwargs["hidden_states"]
    return hidden


@functools.cache
def routed_class(base: Any) -> Any:
    """The subclass of a decoder block's class that routes; under the same name, so that whoever looks blocks up by
    class name (device maps, FSDP's wrap policies, output recording) still finds them.
    """
    parameters = parameters_of_forward(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        mixture = self.mixture
        mixture.open(hidden, parameters, args, kwargs)
        try:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return base.forward(self, *args, **kwargs)
            with rematerialised():
                return base.forward(self, *args, **kwargs)
        finally:
            mixture.context.close()

    def __reduce_ex__(self: Any, protocol: int) -> Any:
        return _new_routed, (base,), self.__dict__

    namespace: dict[str, Any] = {"forward": forward, "__reduce_ex__": __reduce_ex__, "unrouted_class": base}
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), namespace)


def _new_routed(base: Any) -> nn.Module:
    cls = routed_class(base)
    return cls.__new__(cls)


def attach_mixture(view: BlockView, blocks: int) -> Mixture:
    """The block's `Mixture`, created if it has none."""
    block = view.module
    if "mixture" not in _hosts.children(block):
        block.mixture = Mixture(view, blocks)
        block.__class__ = routed_class(block.__class__)
        _rebind_forward(block)
    return block.mixture  # type: ignore[return-value]


def detach_mixture(block: nn.Module) -> None:
    """Give the block its own class back."""
    block.mixture.detach()
    del block.mixture
    block.__class__ = type(block).unrouted_class  # type: ignore[attr-defined]
    _rebind_forward(block)


def _rebind_forward(block: nn.Module) -> None:
    """Accelerate keeps bound methods of the former class on the instance; without this the router would never run."""
    for name in ("_old_forward", "forward"):
        method = block.__dict__.get(name)
        if isinstance(method, types.MethodType) and method.__self__ is block and method.__name__ == "forward":
            block.__dict__[name] = types.MethodType(type(block).forward, block)  # type: ignore[attr-defined]
