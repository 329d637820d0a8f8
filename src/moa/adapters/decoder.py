"""The decoder blocks of a model, each seen through what was found in it and what is said of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from moa.adapters.architectures import EXCEPTIONS, ROLES, Architecture, BlockView, find_module, text_config
from moa.adapters.sharding import Parallel, read_split
from moa.adapters.structure import Finding, attends, crosses, describe, find_parts
from moa.choices import from_fields

DENIED = "it is known, or said by architecture=, to have none"
ENCODER_DECODER = (
    "{name} is an encoder-decoder model: its blocks also attend to an encoder's output, of which a mixture's router "
    "and prompts know nothing. MoA adapts decoder-only language models"
)


def view_blocks(model: nn.Module, override: Mapping[str, Any] | None) -> dict[str, BlockView]:
    """Every decoder block of ``model``, by its qualified name, in order.

    Args:
        model: a transformers model, also one of several parts of which one is the language model.
        override: what the user says in ``MoAConfig(architecture=...)``.

    Raises:
        ValueError: it is no decoder of attention blocks, its blocks cannot be told from other modules, or it is split
            among processes in a way that experts cannot follow.
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(ENCODER_DECODER.format(name=_named(model)))
    known = {**EXCEPTIONS.get(config.model_type, {}), **(override or {})}
    names = find_blocks(model, from_fields("architecture", Architecture, known))
    parallel = read_split(model)
    views = {}
    for index, name in enumerate(names):
        views[name] = _view(model.get_submodule(name), index, known, _config_of_block(config, index), parallel)
    _check_paths(override or {}, list(views.values()))
    if any(view.attention is not None and crosses(view.module) for view in views.values()):
        raise ValueError(ENCODER_DECODER.format(name=_named(model)))
    _check_sharing(views)
    return views


def find_blocks(model: nn.Module, said: Architecture) -> list[str]:
    """Qualified names of the decoder blocks, in order.

    Raises:
        ValueError: no ModuleList, or more than one, can be meant.
    """
    every = dict(_module_lists(model))
    if said.blocks is not None:
        lists = [name for name in every if f".{name}".endswith(f".{said.blocks}")]
        if not lists:
            raise ValueError(
                f"architecture: no ModuleList's path ends with blocks={said.blocks!r}; there are {[*every]}"
            )
    else:
        lists = [name for name, blocks in every.items() if any(_is_block(block, said) for block in blocks)]
    if len(lists) > 1:
        lists = _of_the_language_model(model, every, lists)
    if len(lists) > 1:
        raise ValueError(
            f"cannot tell which of {lists} are the decoder blocks of {_named(model)}. Give the whole path of one list "
            "in MoAConfig(architecture={'blocks': ...})"
        )
    if not lists:
        raise ValueError(
            f"found no decoder block with attention in {_named(model)}: its lists of blocks hold {_contents(every)}. "
            "MoA adapts blocks of attention and a feed-forward module; pure state-space and recurrent models have "
            "none. If this model has, say where with MoAConfig(architecture={'blocks': ..., 'attention': ..., 'q': "
            "..., 'k': ..., 'v': ..., 'o': ..., 'mlp': ..., 'down': ...})"
        )
    return [f"{lists[0]}.{index}" for index in range(len(every[lists[0]]))]


def _of_the_language_model(model: nn.Module, every: Mapping[str, nn.ModuleList], lists: list[str]) -> list[str]:
    """Those of ``lists`` that are not in a tower for pictures or sound, which looks alike; all if nothing tells."""
    if hasattr(model, "get_decoder"):
        inside = {id(module) for module in model.get_decoder().modules()}
        lists = [name for name in lists if id(every[name]) in inside] or lists
    towers = ("vision", "visual", "audio", "image")
    return [name for name in lists if not any(tower in name for tower in towers)] or lists


def _is_block(module: nn.Module, said: Architecture) -> bool:
    return attends(module) or find_module(module, said.attention) is not None


def _contents(lists: Mapping[str, nn.ModuleList]) -> dict[str, list[str]]:
    """What the blocks of every list are made of: class names of their children."""
    return {
        name: sorted({type(child).__name__ for block in blocks for child in block.children()})
        for name, blocks in lists.items()
    }


def _named(model: nn.Module) -> str:
    return f"{type(model).__name__} ({text_config(model).model_type})"


def _module_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost ModuleLists below ``module``."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield prefix + name, child
        else:
            yield from _module_lists(child, f"{prefix}{name}.")


def _config_of_block(config: PretrainedConfig, index: int) -> PretrainedConfig:
    """The block's own configuration in models of unlike blocks, whose common one refuses to be asked."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _view(
    block: nn.Module, index: int, known: Mapping[str, Any], config: PretrainedConfig, parallel: Parallel | None
) -> BlockView:
    finding = find_parts(block, config.hidden_size)
    if "qkv_layout" not in known and finding.layout is not None:
        known = {**known, "qkv_layout": finding.layout}
    architecture = Architecture(**{**finding.paths, **known})
    heads = getattr(find_module(block, architecture.attention), "num_heads", None)
    if isinstance(heads, int) and heads != config.num_attention_heads:  # some families vary them from block to block
        config = copy.copy(config)
        config.num_attention_heads = heads
    absent = {
        role: why for role in ROLES if (why := _why_absent(role, block, architecture, known, finding)) is not None
    }
    return BlockView(block, index, architecture, config, absent, parallel)


def _why_absent(
    role: str, block: nn.Module, architecture: Architecture, known: Mapping[str, Any], finding: Finding
) -> str | None:
    """Why the block certainly has no host for ``role``; None: it has one, or nobody knows."""
    path: str | None = getattr(architecture, role)
    if path is not None and all(find_module(block, end) is not None for end in path.split("..")):
        return None
    if role in known and path is None:
        return DENIED
    return finding.absent.get(role, None if path is None else f"it has no module {path}")


def _check_sharing(views: Mapping[str, BlockView]) -> None:
    """Raise ValueError if two blocks run the same modules, whose experts could not tell which block's gates are theirs.

    Weights that are tied between modules of their own are fine.
    """
    owners: dict[int, str] = {}
    for name, view in views.items():
        for role in ("attention", "mlp"):
            host = view.host(role)
            if host is not None and owners.setdefault(id(host.module), name) != name:
                raise ValueError(
                    f"{owners[id(host.module)]} and {name} share one {role} module: an expert there could not tell "
                    "which of the blocks runs it. Give each block a module of its own (their weights may be tied)"
                )


def _check_paths(override: Mapping[str, Any], views: list[BlockView]) -> None:
    """Raise ValueError if no block has a module that the user names."""
    for role in ROLES:
        for end in (override.get(role) or "").split(".."):
            if end and all(find_module(view.module, end) is None for view in views):
                raise ValueError(
                    f"architecture: no decoder block has a module {end!r} ({role}). The linear layers of block 0 are "
                    f"{describe(views[0].module)}"
                )
