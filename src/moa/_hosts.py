"""Every door into torch, transformers and PEFT that is not part of their public interface, and nothing else.

A function here is the only place that knows a private name; `tests/test_hosts.py` opens each door once, so that a
release that moves it fails there by name and not somewhere in a forward.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers import PretrainedConfig, cache_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# --- torch ------------------------------------------------------------------------------------------------------------


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own children by name, to look up, add or delete without ``getattr``'s search."""
    return module._modules


def parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, past ``getattr``'s search; always the current ones."""
    return module._parameters


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 for tensors of inference mode, which do not count."""
    return -1 if tensor.is_inference() else tensor._version


def state_of(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Where each tensor lies and how often it was changed there, to be compared with an earlier state."""
    return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]


def is_watched(*modules: nn.Module) -> bool:
    """Whether calling one of them does more than its arithmetic: offloading and ZeRO fetch weights in such hooks."""
    for module in modules:  # noqa: SIM110 - asked at every site of every token, and a generator is a call more
        if module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__:
            return True
    return False


def is_view(tensor: Tensor) -> bool:
    """Whether autograd counts the tensor as a view, which an in-place change would have to be replayed on."""
    return tensor._is_view()


def in_backward() -> bool:
    """Whether this thread runs inside of a backward pass, as a recomputed forward does."""
    return torch._C._current_graph_task_id() != -1


def saved_tensor_hooks() -> tuple[Any, Any] | None:
    """The innermost pair of hooks on saved tensors that is active now, None if there is none."""
    found: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found


def saved(node: Any, name: str) -> Any:
    """What an autograd function keeps under ``name``, e.g. ``"self"``; None if it keeps nothing there."""
    return getattr(node, f"_saved_{name}", None)


def keep_address(tensor: Tensor) -> None:
    """Tell the compiler that a tensor stays where it is, so that a CUDA graph may change it in place."""
    torch._dynamo.mark_static_address(tensor)


# --- transformers -----------------------------------------------------------------------------------------------------


def attention_implementation(config: PretrainedConfig) -> str:
    """The name of the attention function that a configuration asks for."""
    return str(config._attn_implementation)


IMPLEMENTATION_PROPERTY = "_attn_implementation"
"""What attention modules read off their configuration; a subclass may override it."""


def stored_implementation(config: PretrainedConfig) -> str | None:
    """As `attention_implementation`, past any override in a subclass."""
    name: str | None = config._attn_implementation_internal
    return name


def store_implementation(config: PretrainedConfig, name: str) -> None:
    """Let a configuration ask for another attention function, without transformers' checks of its name."""
    config._attn_implementation_internal = name


def attention_function(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    """The function that ``module`` calls for an implementation now, others' overrides included.

    Raises:
        ValueError: there is none.
    """
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if function is not None:
        return function  # type: ignore[no-any-return]
    for cls in type(module).__mro__:  # 'eager' is not registered: every modeling file has its own
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise ValueError(f"{type(module).__name__} has no attention function called {implementation!r}")


PREPARE_CACHE = "_prepare_cache_for_generation"
"""The method by which ``generate`` makes a KV cache."""


CACHES = ("cache", "past_key_values", "layer_past")
"""What models call a KV cache: all of them since transformers 5.24, most before, and a few families before."""


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The KV cache that a module is called with, or gives back; None if there is none that `generate` makes.

    Continuous batching's is none, which belongs to no text.
    """
    for name in CACHES:
        cache = arguments.get(name)
        if cache is not None and not is_paged(cache):
            return cache
    return None


LAYER_WITHOUT_KEYS: Any = getattr(cache_utils, "DummyLayer", object)
"""What a KV cache has in the place of a layer that keeps no keys, and that no mask is made after."""


def is_paged(cache: Any) -> bool:
    """Whether a cache is continuous batching's."""
    return type(cache).__name__ == "PagedAttentionCache"


def name_of_cache(forward: Callable[..., Any]) -> str:
    """What a model's ``forward`` calls its KV cache.

    Raises:
        ValueError: it takes none.
    """
    parameters = inspect.signature(forward).parameters
    for name in CACHES:
        if name in parameters:
            return name
    raise ValueError(
        f"{getattr(forward, '__qualname__', forward)} takes no KV cache: its parameters are {[*parameters]}"
    )


def name_or_path(config: PretrainedConfig) -> str:
    """What a model was loaded from."""
    return str(config._name_or_path)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def features_of(module: nn.Module) -> tuple[int | None, int | None]:
    """Width of a linear layer's input and output in any of the forms that PEFT knows; None for everything else."""
    from peft.tuners.tuners_utils import _get_in_out_features

    return _get_in_out_features(module)


def loads_shards() -> bool:
    """Whether PEFT gathers an adapter's DTensors when it saves and splits the file's tensors alike when it loads."""
    from peft.utils import save_and_load

    return hasattr(save_and_load, "_reshard_dtensor_values_for_load")


def adapters_of_wrapper(wrapper: nn.Module) -> set[str]:
    """The adapters that a wrapper of ``modules_to_save`` or of trainable tokens holds something of."""
    return set(wrapper._adapters)  # type: ignore[arg-type]


def append_method(name: str) -> PeftType:
    """The member ``name`` of PEFT's closed enum of methods, appended if PEFT does not have it."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member
