"""Which blocks can be computed as a whole: those whose structure is known for certain and that nobody else looks into.

A block is taken apart only if it is, module by module, one of the listed transformers classes with plain frozen
weights, with no hook but MoA's own inside it, and one active adapter whose experts the fused functions know. In every
other case `parts_of` raises `Unfit` with the reason, and the block runs its own forward with experts attached by hooks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa.adapters.experts.base import ExpertLayer
from moa.adapters.experts.lora import LoraLayer
from moa.adapters.experts.parallel import ParallelLayer
from moa.adapters.experts.prompt import PromptLayer
from moa.adapters.fused.attention import Output
from moa.adapters.fused.low_rank import Update
from moa.adapters.fused.mlp import Mlp
from moa.adapters.fused.projections import Projections
from moa.adapters.tuner import Attached

# transformers' module -> prefix of its classes; their decoder layers compute the same, but for q_norm and k_norm.
FAMILIES = {
    "transformers.models.llama.modeling_llama": "Llama",
    "transformers.models.mistral.modeling_mistral": "Mistral",
    "transformers.models.qwen2.modeling_qwen2": "Qwen2",
    "transformers.models.qwen3.modeling_qwen3": "Qwen3",
}


class Unfit(Exception):
    """Why a block runs its own forward."""


class Parts(NamedTuple):
    """A block taken apart; trained tensors as the fused functions want them.

    Attributes:
        adapter: the one active adapter.
        block: the decoder block.
        qkv: the three projections with their updates.
        output: the attention's output.
        output_ab: A and B of the output projection's update, or nothing.
        prompt: the prompt expert, or None.
        mlp: the feed-forward part.
        parallel: the four tensors of the parallel adapter, or nothing.
        down_ab: A and B of the down projection's update, or nothing.
    """

    adapter: str
    block: Any
    qkv: Projections
    output: Output
    output_ab: list[Tensor]
    prompt: PromptLayer | None
    mlp: Mlp
    parallel: list[Tensor]
    down_ab: list[Tensor]


def parts_of(block: Any, adapter: str) -> Parts:
    """Take ``block`` apart for its only active adapter.

    Raises:
        Unfit: it cannot be computed as a whole.
    """
    check_classes(block)
    attention, mlp = block.self_attn, block.mlp
    for module in (block.input_layernorm, block.post_attention_layernorm, attention, mlp, mlp.act_fn):
        check_untouched(module)
    if attention.training and attention.attention_dropout:
        raise Unfit("attention dropout")
    q, k, v, o = (read_linear(getattr(attention, f"{name}_proj"), adapter) for name in "qkvo")
    gate, up, down = (read_linear(getattr(mlp, f"{name}_proj"), adapter) for name in ("gate", "up", "down"))
    prompt = only_expert(attention, adapter, PromptLayer)
    parallel = only_expert(mlp, adapter, ParallelLayer)
    return Parts(
        adapter=adapter,
        block=block,
        qkv=projections([q, k, v]),
        output=Output(
            o.weight, o.bias, o.update, None if prompt is None else prompt.output[adapter], attention.scaling
        ),
        output_ab=o.ab,
        prompt=prompt,  # type: ignore[arg-type]
        mlp=Mlp(
            inner=projections([gate, up]),
            weight=down.weight,
            bias=down.bias,
            update=down.update,
            parallel_column=None if parallel is None else parallel.output[adapter],
        ),
        parallel=parallel_tensors(parallel, adapter),
        down_ab=down.ab,
    )


class ReadLinear(NamedTuple):
    """A frozen linear layer and its one update: ``ab`` is A and B, or empty."""

    weight: Tensor
    bias: Tensor | None
    update: Update | None
    ab: list[Tensor]


def read_linear(layer: Any, adapter: str) -> ReadLinear:
    check_untouched(layer)
    if type(layer) is not nn.Linear or not plain(layer.weight):
        raise Unfit(f"{type(layer).__name__} is not a plain linear layer")
    lora = only_expert(layer, adapter, LoraLayer)
    if lora is None:
        return ReadLinear(layer.weight, layer.bias, None, [])
    if lora.training and not isinstance(lora.moa_dropout[adapter], nn.Identity):  # type: ignore[index]
        raise Unfit("dropout")
    update = Update(lora.scaling[adapter], lora.output[adapter])  # type: ignore[index]
    return ReadLinear(layer.weight, layer.bias, update, [lora.moa_A[adapter].weight, lora.moa_B[adapter].weight])  # type: ignore[index]


def projections(layers: list[ReadLinear]) -> Projections:
    updated = [layer for layer in layers if layer.update is not None]
    return Projections(
        weights=[layer.weight for layer in layers],
        biases=[layer.bias for layer in layers],
        updates=[layer.update for layer in layers],
        a=[layer.ab[0] for layer in updated],
        b=[layer.ab[1] for layer in updated],
    )


def parallel_tensors(layer: Any, adapter: str) -> list[Tensor]:
    if layer is None:
        return []
    if layer.activation[adapter] not in ("silu", "swish"):
        raise Unfit(f"a parallel adapter with {layer.activation[adapter]}")
    down, up = layer.moa_down[adapter], layer.moa_up[adapter]
    return [down.weight, down.bias, up.weight, up.bias.view(-1)]


def only_expert(host: nn.Module, adapter: str, kind: type[ExpertLayer]) -> Any:
    """The host's one expert of this adapter, None if it has none."""
    found = [
        child
        for child in host._modules.values()
        if isinstance(child, ExpertLayer) and adapter in child.output and not child.disable_adapters
    ]
    if not found:
        return None
    if len(found) > 1 or type(found[0]) is not kind:
        raise Unfit("experts that the fused functions do not know, or several of a kind at one place")
    if "mixture_copies" in found[0]._modules and adapter in found[0].mixture_copies.moa_w2:  # type: ignore[union-attr,operator]
        raise Unfit("several copies of an expert")
    return found[0]


def check_classes(block: Any) -> None:
    base = type(block).unrouted_class
    prefix = FAMILIES.get(base.__module__)
    if prefix is None or base.__name__ != f"{prefix}DecoderLayer":
        raise Unfit(f"{base.__name__} is not in the table")
    expected = {
        "self_attn": f"{prefix}Attention",
        "mlp": f"{prefix}MLP",
        "input_layernorm": f"{prefix}RMSNorm",
        "post_attention_layernorm": f"{prefix}RMSNorm",
        "mixture": "Mixture",
    }
    found = {name: type(child).__name__ for name, child in block._modules.items()}
    if found != expected:
        raise Unfit(f"the block consists of {found}")
    if block.self_attn.config.hidden_act not in ("silu", "swish"):
        raise Unfit(f"the MLP's activation is {block.self_attn.config.hidden_act}")


def check_untouched(module: Any) -> None:
    """Nobody but MoA may expect this module to be called, or to train."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(not isinstance(getattr(hook, "__self__", None), Attached) for hook in hooks):
        raise Unfit(f"a hook on {type(module).__name__}")
    if module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__:
        raise Unfit(f"a hook on {type(module).__name__}")
    if any(parameter is not None and parameter.requires_grad for parameter in module._parameters.values()):
        raise Unfit(f"{type(module).__name__} is being trained itself")


def plain(weight: Tensor) -> bool:
    """A full tensor in a float format: not quantised, sharded, offloaded or on the meta device."""
    return (
        type(weight.data) is Tensor
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight.device.type != "meta"
    )
