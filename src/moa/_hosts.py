"""Every door into torch, transformers and PEFT that is not part of their public interface, and nothing else.

A function here is the only place that knows a private name; `tests/test_hosts.py` opens each door once, so that a
release that moves it fails there by name and not somewhere in a forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

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


def is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its arithmetic: offloading and ZeRO fetch weights in such hooks."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__)


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


# --- transformers -----------------------------------------------------------------------------------------------------


def attention_implementation(config: PretrainedConfig) -> str | None:
    """The name of the attention function that a configuration asks for."""
    name: str | None = config._attn_implementation
    return name


IMPLEMENTATION_PROPERTY = "_attn_implementation"
"""What attention modules read off their configuration; a subclass may override it."""


def stored_implementation(config: PretrainedConfig) -> str | None:
    """As `attention_implementation`, past any override in a subclass."""
    name: str | None = config._attn_implementation_internal
    return name


# --- PEFT -------------------------------------------------------------------------------------------------------------


def features_of(module: nn.Module) -> tuple[int | None, int | None]:
    """Width of a linear layer's input and output in any of the forms that PEFT knows; None for everything else."""
    from peft.tuners.tuners_utils import _get_in_out_features

    return _get_in_out_features(module)
