"""How a decoder block carries its router and hands gates to its experts.

The block's class is exchanged for a subclass whose forward opens a `BlockContext`, routes, runs the original forward
and closes the context again. A subclass, and not a hook or a wrapper, because activation checkpointing re-runs
``forward`` of the class: gates computed anywhere else are missing or stale when backward recomputes the block.
Experts find their gates in the context, which is thread-local, so that one model may serve several threads.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from typing import Any, ClassVar

from torch import Tensor, nn

from moa.adapters import pooling
from moa.adapters.architectures import BlockView
from moa.adapters.gating import Gates
from moa.adapters.routers import Router, RouterLayer


class BlockContext(threading.local):
    """What a block's experts need to know about the forward that is running now, in this thread.

    Attributes:
        gates: adapter -> (batch, tokens, router outputs); an adapter without a router is missing.
        tokens: (batch, tokens), True for text, or None if nothing is padded.
        notes: expert -> whatever it saw before its host ran and needs afterwards.
        bypassed: experts leave their hosts' outputs as they are (while prompt keys are computed).
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.gates: dict[str, Tensor] = {}
        self.tokens: Tensor | None = None
        self.notes: dict[Any, Any] = {}
        self.bypassed = False
        self.is_open = False

    def gate(self, adapter: str, output: int | None, like: Tensor) -> Tensor | None:
        """The gate (..., 1) of one router output in the shape and dtype of ``like`` (..., features); None: not gated.

        Raises:
            RuntimeError: called outside of the block's forward, or on tokens other than the block's.
        """
        if not self.is_open:
            raise RuntimeError("a MoA expert ran outside of its decoder block's forward, where there are no gates")
        if output is None:
            return None
        gate = self.gates[adapter][..., output : output + 1].to(like.dtype)
        if gate.shape[:-1] == like.shape[:-1]:
            return gate
        if gate.shape[:-1].numel() == like.shape[:-1].numel():  # some MLPs flatten (batch, tokens)
            return gate.reshape(*like.shape[:-1], 1)
        raise RuntimeError(f"gates of shape {tuple(gate.shape)} do not fit an expert's input {tuple(like.shape)}")

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockContext:
        copied = memo[id(self)] = BlockContext()
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockContext, ()


class Mixture(RouterLayer):
    """The router of one decoder block, attached to it as ``mixture``, and the context it shares with its experts."""

    other_param_names: ClassVar[tuple[str, ...]] = ("gating", "router", "columns", "column_outputs", "auxiliary")

    def __init__(self, view: BlockView):
        super().__init__(view.module, view.hidden_size)
        self.index = view.index
        self.mask_hides = view.architecture.mask_hides
        self.context = BlockContext()
        self.router: dict[str, Router] = {}
        self.columns: dict[str, list[str]] = {}
        self.column_outputs: dict[str, list[int]] = {}
        self.auxiliary: dict[str, bool] = {}  # whether this router, or one over an expert's copies, has such a loss
        self._handles = []
        if view.attention is not None:
            self._attention_parameters = parameters_of_forward(type(view.attention))
            self._handles.append(view.attention.register_forward_pre_hook(self._before_attention, with_kwargs=True))

    def open(self, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Start a forward of the block on ``hidden`` (batch, tokens, hidden_size) with its other arguments."""
        self.context.clear()
        self.context.is_open = True
        if self._needs_tokens():
            self.context.tokens = self._text_positions(hidden, arguments)
        if self.enabled(self.router):
            self._route(hidden, "block", arguments)

    def close(self) -> None:
        self.context.clear()

    def _before_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.context.is_open and not self.context.bypassed and self.enabled(self.router):
            arguments = bound_arguments(self._attention_parameters, args, kwargs)
            self._route(arguments["hidden_states"], "attention", arguments)

    def _route(self, features: Tensor, stage: str, arguments: dict[str, Any]) -> None:
        adapters = [name for name in self.enabled(self.router) if self.router[name].input == stage]
        if not adapters:
            return
        past = arguments.get("past_key_values")
        for name in adapters:
            pooled = pooling.pool(features, self.router[name].level, self.context.tokens, past, (self.index, name))
            gates: Gates = self(pooled, name, self.context.tokens)
            self.context.gates[name] = gates.weights

    def _needs_tokens(self) -> bool:
        if self.training and any(self.auxiliary[name] for name in self.enabled(self.auxiliary)):
            return True
        return any(self.router[name].level == "instance" for name in self.enabled(self.router))

    def _text_positions(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        mask = arguments.get("attention_mask")
        if self.mask_hides and mask is not None:
            mask = ~mask
        return pooling.text_positions(hidden, mask, arguments.get("past_key_values"), self.index)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()


def parameters_of_forward(cls: type[nn.Module]) -> list[str]:
    """Names of what the class's ``forward`` can be called with, for `bound_arguments`; not to be asked per call."""
    return list(inspect.signature(cls.forward).parameters)[1:]


def bound_arguments(parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name; a first positional one is always called ``hidden_states``."""
    named = dict(zip(parameters, args, strict=False)) | kwargs
    named.setdefault("hidden_states", args[0] if args else None)
    if "past_key_values" not in named and "layer_past" in named:
        named["past_key_values"] = named["layer_past"]
    return named


@functools.cache
def routed_class(base: Any) -> Any:
    """The subclass of a decoder block's class that routes; under the same name, so that whoever looks blocks up by
    class name (device maps, FSDP's wrap policies, output recording) still finds them.
    """
    from moa.adapters.fused import continued, whole_block  # here, because it knows the experts, which know this module

    parameters = parameters_of_forward(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = bound_arguments(parameters, args, kwargs)
        output = continued(self, arguments)
        if output is not None:
            return output
        self.mixture.open(arguments["hidden_states"], arguments)
        try:
            output = whole_block(self, arguments)
            return base.forward(self, *args, **kwargs) if output is None else output
        finally:
            self.mixture.close()

    def __reduce_ex__(self: Any, protocol: int) -> Any:
        return _new_routed, (base,), self.__dict__

    namespace: dict[str, Any] = {"forward": forward, "__reduce_ex__": __reduce_ex__, "unrouted_class": base}
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), namespace)


def _new_routed(base: Any) -> nn.Module:
    cls = routed_class(base)
    return cls.__new__(cls)


def attach_mixture(view: BlockView) -> Mixture:
    """The block's `Mixture`, created if it has none."""
    block = view.module
    if "mixture" not in block._modules:
        block.mixture = Mixture(view)
        block.__class__ = routed_class(block.__class__)
        _rebind_forward(block)
    return block.mixture  # type: ignore[return-value]


def detach_mixture(block: nn.Module) -> None:
    """Give the block its own class back."""
    block.mixture.detach()
    del block._modules["mixture"]
    block.__class__ = type(block).unrouted_class  # type: ignore[attr-defined]
    _rebind_forward(block)


def _rebind_forward(block: nn.Module) -> None:
    """Accelerate keeps bound methods of the former class on the instance; without this the router would never run."""
    for name in ("_old_forward", "forward"):
        method = block.__dict__.get(name)
        if isinstance(method, types.MethodType) and method.__self__ is block and method.__name__ == "forward":
            block.__dict__[name] = types.MethodType(type(block).forward, block)  # type: ignore[attr-defined]
