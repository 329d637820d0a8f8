"""A guest in transformers' attention interface, for adapted attention modules only.

For every attention implementation ``x`` a function ``moa|x`` is registered; it runs ``x`` and then lets the module's
guests (prompt experts) add to the result. Adapted modules get a *view* of their configuration, the same object in
all respects but that its ``_attn_implementation`` reads ``moa|x``. The shared configuration is left alone: mask
construction, ``generate`` and trainers look at it and must go on seeing ``x``, and a later
``model.set_attn_implementation`` is followed by itself. Which function ``x`` is gets looked up at every call, so that
what others put in its place is respected.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa import _hosts

PREFIX = "moa|"


def uses_interface(attention: nn.Module) -> bool:
    """Whether the module's own forward calls transformers' attention interface."""
    for cls in type(attention).__mro__:
        forward = cls.__dict__.get("forward")
        code = getattr(getattr(forward, "__wrapped__", forward), "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            return True
    return False


def _with_guests(implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        # asked of classes: a module that lacks an attribute takes its time to say so
        guests: list[Any] = [c for c in _hosts.children(module).values() if hasattr(type(c), "after_attention")]
        for guest in guests:
            now = guest.context.forward
            if now is not None and now.bypassed:  # a guest is asking for its own keys and values
                now.notes["probe"] = (key, value)
                return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
        output, weights = _hosts.attention_function(module, implementation)(
            module, query, key, value, attention_mask, *args, **kwargs
        )
        for guest in guests:
            output = guest.after_attention(module, query, kwargs.get("scaling"), output)
        return output, weights

    return forward


def _register(implementation: str) -> str:
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _with_guests(implementation))
    return name


def _own_config(view: Any) -> PretrainedConfig:
    return view.moa_host_config


@functools.cache
def _view_class(cls: Any) -> Any:
    def implementation(self: Any) -> str | None:
        own = _hosts.stored_implementation(self)
        return None if own is None else _register(own)

    setter = getattr(cls, _hosts.IMPLEMENTATION_PROPERTY).fset
    namespace = {
        "__slots__": ("moa_host_config",),
        _hosts.IMPLEMENTATION_PROPERTY: property(implementation, setter),
        "__deepcopy__": lambda self, memo: _view(copy.deepcopy(_own_config(self), memo)),
        "__reduce_ex__": lambda self, protocol: (_view, (_own_config(self),)),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "is_moa_view": True,
    }
    return type(cls.__name__, (cls,), namespace)


def _view(config: PretrainedConfig) -> PretrainedConfig:
    """An object that shares ``config``'s attributes, both ways."""
    view = object.__new__(_view_class(config.__class__))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "moa_host_config", config)
    return view


def install(attention: nn.Module) -> None:
    """Let guests of ``attention`` take part in its attention."""
    if not getattr(type(attention.config), "is_moa_view", False):
        attention.config = _view(attention.config)  # type: ignore[arg-type]


def uninstall(attention: nn.Module) -> None:
    """Give the module its own configuration back."""
    if getattr(type(attention.config), "is_moa_view", False):
        attention.config = _own_config(attention.config)
