"""Plans for engines, which know no spans per head: two classes of heads, or one window for whole layers.

Both are written as an ordinary checkpoint of transformers, with `FILE` beside it.

- `two_class` changes no number. In every layer the KV heads that see everything come first, then the others, which
  share a sink and a window; weights move with their heads. Anything loads the model, dense or under the plan beside it.
  An engine that gives a layer two groups of KV heads, a full one and a sliding one with sinks, finds in `FILE` where to
  cut.
- `layer_windows` is an approximation that engines run today: ``layer_types`` and ``sliding_window`` in the model's
  configuration, which transformers and vLLM read. A layer sees everything or a window, all its heads alike, and windows
  have no sink. So its price has to be measured (`measured`): answers that need far context, or the sink, are lost.

Both are for texts of one length: windows of engines do not grow with the text.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from moa.spans.evidence.items import Item, answers_kept, predicted
from moa.spans.model import FULL, SLIDING, ModelShape
from moa.spans.plan import SpanPlan
from moa.spans.runtime.application import attention_modules

FILE = "span_export.json"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
WINDOWED = "ministral"  # Llama with a window per layer: the same weights under the same names
LIKE_IT = ("llama", "mistral")


class Export(NamedTuple):
    """What is written beside the weights.

    Attributes:
        config: of the model as engines shall load it.
        plan: for the heads in their new order; None where the configuration says it all.
        layers: one entry per layer.
        kv_bytes: of the cache of one text of that length: dense, under the plan, and as exported.
    """

    config: PretrainedConfig
    plan: SpanPlan | None
    layers: list[dict[str, Any]]
    kv_bytes: dict[str, int]


def two_class(model: PreTrainedModel, plan: SpanPlan, length: int) -> Export:
    """Order the KV heads of every layer, those that see everything first; the model's weights are moved in place.

    Args:
        model: with separate projections of queries, keys, values and outputs.
        plan: of two spans at that length, everything and one other.
        length: tokens.

    Raises:
        ValueError: the plan has other spans, or the model's heads cannot be moved; nothing is moved then.
    """
    shape, spans = _spans(model, plan, length)
    if len(windows := sorted({span for row in spans for span in row if span < length})) > 1:
        raise ValueError(
            f"the plan has windows of {windows} tokens in texts of {length}, and heads of two classes have one; take a "
            "plan of the kind 'two-class', which `moa spans search` writes too, or export layers"
        )
    modules = attention_modules(model.get_decoder() or model, shape.layers)
    for layer, module in enumerate(modules):
        _check_movable(layer, module, shape)
    heads = range(shape.kv_heads)
    orders = [[h for h in heads if row[h] == length] + [h for h in heads if row[h] < length] for row in spans]
    for module, order in zip(modules, orders, strict=True):
        _move(module, order, shape)
    rules = plan.for_model(model, length)
    tables: dict[str, Any] = {
        name: [[row[head] for head in order] for row, order in zip(getattr(rules, name), orders, strict=True)]
        for name in ("alphas", "betas")
    }
    moved = dataclasses.replace(rules, **tables)
    layers = [
        {
            "kv_heads_in_order_of_the_original": order,
            "full_kv_heads": sum(span == length for span in row),
            "sink": plan.sink,
            "window": windows[0] - plan.sink if windows and min(row) < length else None,
        }
        for row, order in zip(spans, orders, strict=True)
    ]
    held = plan.kv_bytes(model, length)
    return Export(model.config, moved, layers, {"dense": _dense(model, length), "plan": held, "exported": held})


def layer_windows(model: PreTrainedModel, plan: SpanPlan, length: int) -> Export:
    """Whole layers that see everything, as many as the plan's bytes allow, and the plan's shortest span for the others.

    Full are the layers to which the plan gives most. Weights stay as they are.

    Raises:
        ValueError: a family whose layers cannot have windows in transformers.
    """
    shape, spans = _spans(model, plan, length)
    window, layers = min(map(min, spans)), shape.layers
    budget = sum(map(sum, spans)) // shape.kv_heads
    full = layers if window == length else (budget - layers * window) // (length - window)
    most = sorted(range(layers), key=lambda layer: (-sum(spans[layer]), layer))[:full]
    kinds = [FULL if layer in most else SLIDING for layer in range(layers)]
    config = _windowed(model, kinds, window)
    dense = _dense(model, length)
    held = dense * sum(length if kind == FULL else window for kind in kinds) // (layers * length)
    return Export(
        config,
        None,
        [{"kind": kind, "window": None if kind == FULL else window} for kind in kinds],
        {"dense": dense, "plan": plan.kv_bytes(model, length), "exported": held},
    )


def measured(model: Any, items: Sequence[Item]) -> dict[str, float]:
    """Loss of the answers' tokens, in nats, and the share of answers that stay the most likely ones, over items."""
    losses, kept = [], []
    for item in items:
        loss, hits = predicted(model, item)
        losses.append(float(loss.mean()))
        kept += answers_kept(item, hits)
    return {"loss": fmean(losses), "right": fmean(kept)}


def save(model: PreTrainedModel, export: Export, folder: Path, about: dict[str, Any]) -> Path:
    """Write the model as it has to be loaded, the plan if there is one, and `FILE`, of which the path is returned."""
    model.save_pretrained(folder)
    export.config.save_pretrained(folder)
    if export.plan is not None:
        export.plan.save(folder)
    file = folder / FILE
    content = {**about, "kv_bytes": export.kv_bytes, "layers": export.layers}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def _spans(model: PreTrainedModel, plan: SpanPlan, length: int) -> tuple[ModelShape, list[list[int]]]:
    shape = ModelShape.of(model)
    if set(shape.windows) != {None}:
        raise ValueError(f"{model.config.model_type}: layers have windows of their own, which an export would replace")
    return shape, plan.for_model(model, length).spans(length)


def _dense(model: PreTrainedModel, length: int) -> int:
    shape = ModelShape.of(model)
    return SpanPlan.dense(shape.layers, shape.kv_heads).kv_bytes(model, length)


def _check_movable(layer: int, module: nn.Module, shape: ModelShape) -> None:
    """Whether everything in an attention module is known to move with its heads, or to be alike for all heads."""
    widths = {"q_proj": shape.query_heads, "k_proj": shape.kv_heads, "v_proj": shape.kv_heads}
    found = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    wide = {name: found[name].weight.shape[0] // shape.head_dim for name in widths if name in found}
    if wide != widths or "o_proj" not in found:
        raise ValueError(
            f"layer {layer}: KV heads are moved in plain linear layers {list(PROJECTIONS)} with {widths} heads; "
            f"{type(module).__name__} has {wide}; merge adapters and take unquantised weights"
        )
    for name, tensor in module.named_parameters():
        if name.split(".")[0] not in PROJECTIONS and tensor.numel() != shape.head_dim:
            raise ValueError(
                f"layer {layer}: {name} of {type(module).__name__} is neither a projection nor shared by heads"
            )


@torch.no_grad()
def _move(module: nn.Module, order: list[int], shape: ModelShape) -> None:
    """Put KV heads in this order, each with its query heads."""
    queries = [head * shape.group + i for head in order for i in range(shape.group)]
    for name, heads in zip(PROJECTIONS, (queries, order, order, queries), strict=True):
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        columns = torch.tensor([head * shape.head_dim + i for head in heads for i in range(shape.head_dim)])
        columns = columns.to(linear.weight.device)
        linear.weight.copy_(linear.weight.index_select(1 if name == "o_proj" else 0, columns))
        if linear.bias is not None and name != "o_proj":
            linear.bias.copy_(linear.bias.index_select(0, columns))


def _windowed(model: PreTrainedModel, kinds: list[str], window: int) -> PretrainedConfig:
    """The model's configuration with a kind for every layer."""
    given = model.config.to_dict()
    settings = {"layer_types": kinds, "sliding_window": window, "use_sliding_window": True}
    if given["model_type"] in LIKE_IT and not (given.get("attention_bias") or given.get("mlp_bias")):
        known = AutoConfig.for_model(WINDOWED).to_dict()
        shared = {key: value for key, value in given.items() if key in known and key != "model_type"}
        own = {"layer_types": kinds, "sliding_window": window, "architectures": ["MinistralForCausalLM"]}
        return AutoConfig.for_model(WINDOWED, **{**shared, **own})
    modeling = sys.modules[type(model).__module__]
    if "layer_types" not in given or not hasattr(modeling, "create_sliding_window_causal_mask"):
        raise ValueError(
            f"{given['model_type']}: its layers cannot have windows in transformers; families with 'layer_types' in "
            f"their configuration can, and {list(LIKE_IT)} without biases"
        )
    return type(model.config).from_dict({**given, **{k: v for k, v in settings.items() if k in given}})
