"""Checkpoints of the official implementation into our parameters.

What our modules hold is listed as *slots* under the official names: a view of a parameter, or of the part of it that
is one of several copies. A checkpoint fits if its names are the slots' names. Two dialects exist: the native path
(``llama.layers.0.attention.lora_Q...``) and the transformers path (``...layers.0.self_attn.lora_Q...``). They differ
in names and in one fact: native rotary embedding pairs neighbouring rows of q and k, Hugging Face's pairs halves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa.adapters.block import Mixture
from moa.adapters.gating import Threshold, TopK
from moa.adapters.members import active_adapters, experts_of, mixtures_of

# Site -> path inside a block: native (`LLaMA3_soft_moa/llama/llama.py:370-399,552-558,608`), transformers
# (`modeling_llama.py:251,331-340,457`).
PATHS = {
    "q": ("attention.lora_Q", "self_attn.lora_Q"),
    "k": ("attention.lora_K", "self_attn.lora_K"),
    "v": ("attention.lora_V", "self_attn.lora_V"),
    "o": ("attention.lora_O", "self_attn.lora_O"),
    "up": ("feed_forward.lora_UP", "mlp.lora_up"),
    "gate": ("feed_forward.lora_GATE", "mlp.lora_gate"),
    "down": ("feed_forward.lora_DOWN", "mlp.lora_down"),
    "prompt": ("attention.prompt", "self_attn.prompt"),
    "parallel": ("p_adapter", "p_adapter"),
}

# Gate column -> its own linear layer, where gates are not the outputs of one router (`LLaMA3_UniPEFT/...:594-615`).
SEPARATE_GATES = {"lora": "lora_gate", "prompt": "prompt_gate", "parallel": "p_adapter_gate"}

_NAME = re.compile(r"(?P<prefix>(?:\w+\.)*?)layers\.(?P<block>\d+)\.(?P<rest>.+)")


class Slot(NamedTuple):
    """Where one official tensor goes.

    Attributes:
        destination: a view of our parameter in the official shape; None: the official code never uses this tensor.
        shape: the official shape.
        heads: of a q or k projection, whose rows may need another order; 0 for everything else.
        required: whether a checkpoint without it is incomplete.
    """

    destination: Tensor | None
    shape: tuple[int, ...]
    heads: int = 0
    required: bool = True


def _slot(destination: Tensor, heads: int = 0) -> Slot:
    return Slot(destination.detach(), tuple(destination.shape), heads)


def _unused(*shape: int, required: bool = False) -> Slot:
    return Slot(None, shape, required=required)


@dataclass
class Checkpoint:
    """The tensors of an official checkpoint by block and name inside the block, and its dialect.

    Attributes:
        tensors: (block, name) -> tensor. Tensors without elements (a router over no experts) are left out.
        prefix: what the names began with, to name missing ones alike.
        native: whether it comes from the native path.
        expert_lists: LoRA copies are called ``experts.<i>.lora_A`` (`sparse_moe.py`) and not ``lora_A_l.<i>``.
        strange: names that belong to no block.
    """

    tensors: dict[tuple[int, str], Tensor]
    prefix: str
    native: bool
    expert_lists: bool
    strange: list[str]

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> Checkpoint:
        matches = {name: _NAME.fullmatch(name) for name in tensors}
        found = {name: match for name, match in matches.items() if match is not None}
        prefixes = [match["prefix"] for match in found.values()]
        return cls(
            {(int(m["block"]), m["rest"]): tensors[name] for name, m in found.items() if tensors[name].numel()},
            max(prefixes, key=prefixes.count, default=""),
            any(match["rest"].startswith(("attention.", "feed_forward.")) for match in found.values()),
            any(".experts." in match["rest"] for match in found.values()),
            [name for name, match in matches.items() if match is None],
        )

    def full_name(self, block: int, name: str) -> str:
        return f"{self.prefix}layers.{block}.{name}"

    def path(self, site: str) -> str:
        if site not in PATHS:
            raise ValueError(f"the official implementation has no expert like this model's {site!r}")
        return PATHS[site][0 if self.native else 1]


def load_reference(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint of the official implementation into the model's active mixture.

    Args:
        model: a PeftModel, or any model with a mixture, configured like the checkpoint (`reference_config`).
        tensors: under the names of the official checkpoints, native (``llama.layers...``) or transformers
            (``base_model.model.model.layers...``); ``layers...`` alone will do. Any dtype; values are copied as they
            are, only q's and k's rows of native checkpoints are put into Hugging Face's order.

    Raises:
        ValueError: tensors that are missing, unknown, or of another shape; all are named, and nothing was written.

    Example:
        >>> model = get_peft_model(base, moa.reference_config("LLaMA3_soft_moa", settings))
        >>> moa.load_reference(model, torch.load("adapter.pth", weights_only=True))
    """
    checkpoint = Checkpoint.read(tensors)
    slots = model_slots(model, checkpoint)
    _check(slots, checkpoint)
    with torch.no_grad():
        for key, tensor in checkpoint.tensors.items():
            slot = slots[key]
            if slot.destination is None:
                continue
            tensor = tensor.to(torch.float32)
            if slot.heads and checkpoint.native:
                tensor = rotate_half_rows(tensor, slot.heads)
            slot.destination.copy_(tensor)


def rotate_half_rows(weight: Tensor, heads: int) -> Tensor:
    """(heads * width, columns): rows of each head from neighbouring pairs to halves, as Hugging Face rotates them."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _check(slots: dict[tuple[int, str], Slot], checkpoint: Checkpoint) -> None:
    given = checkpoint.tensors
    missing = [checkpoint.full_name(*key) for key, slot in slots.items() if slot.required and key not in given]
    unknown = [checkpoint.full_name(*key) for key in given if key not in slots] + checkpoint.strange
    shapes = [
        f"{checkpoint.full_name(*key)} is {tuple(tensor.shape)} in the checkpoint, {slots[key].shape} in this model"
        for key, tensor in given.items()
        if key in slots and tuple(tensor.shape) != slots[key].shape
    ]
    problems = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    if missing or unknown or shapes:
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems if names)
        raise ValueError(f"this checkpoint does not fit the model's configuration. Tensors {told}")


def model_slots(model: nn.Module, checkpoint: Checkpoint) -> dict[tuple[int, str], Slot]:
    """Every tensor that ``model``'s active adapter may find in ``checkpoint``, by (block, name).

    Raises:
        ValueError: the model has no mixture, several active ones, or experts that the official code does not have.
    """
    names, mixtures = active_adapters(model), mixtures_of(model)
    if len(names) != 1:
        raise ValueError(f"load_reference needs a model with one active mixture; active are {names}")
    (adapter,) = names
    has_threshold = any(adapter in mixture.moa_threshold for mixture in mixtures)
    slots = {}
    for mixture in mixtures:
        found = dict(_router_slots(mixture, adapter, has_threshold))
        for layer in experts_of(mixture, adapter):
            path = checkpoint.path(layer.site)
            found.update(EXPERT_SLOTS[layer.config.kind](layer, adapter, path, checkpoint.expert_lists))
        slots.update({(mixture.index, name): slot for name, slot in found.items()})
    return slots


def _linear(name: str, layer: Any) -> Iterator[tuple[str, Slot]]:
    yield f"{name}.weight", _slot(layer.weight)
    if layer.bias is not None:
        yield f"{name}.bias", _slot(layer.bias)


def _router_slots(mixture: Mixture, adapter: str, has_threshold: bool) -> Iterator[tuple[str, Slot]]:
    if adapter in mixture.moa_threshold:
        yield from _linear("adapter_threshold_fn", mixture.moa_threshold[adapter])
    elif has_threshold:  # a block without experts, whose threshold decides nothing
        yield "adapter_threshold_fn.weight", _unused(1, mixture.in_features)
        yield "adapter_threshold_fn.bias", _unused(1)
    if adapter not in mixture.router:
        return
    columns = mixture.columns[adapter]
    if "lora" in columns:
        yield from _separate_gates(mixture, adapter)
    elif adapter in mixture.moa_w1:
        for part in ("w1", "w2", "w3"):
            yield from _linear(f"adapter_type_router.{part}", getattr(mixture, f"moa_{part}")[adapter])
    else:
        yield from _linear("adapter_type_router", mixture.moa_w2[adapter])
    if isinstance(
        mixture.gating[adapter], Threshold
    ):  # built on request, its use is commented out (`llama.py:533-554`)
        yield "adapter_noise_linear.weight", _unused(len(columns), mixture.in_features)
        yield "adapter_noise_linear.bias", _unused(len(columns))


def _separate_gates(mixture: Mixture, adapter: str) -> Iterator[tuple[str, Slot]]:
    """One linear layer per gate: rows of our one router; the gate that repeats another's output was never used."""
    router = mixture.moa_w2[adapter]
    used: set[int] = set()
    for column, output in zip(mixture.columns[adapter], mixture.column_outputs[adapter], strict=True):
        name, rows = SEPARATE_GATES[column], slice(output, output + 1)
        if output in used:
            yield f"{name}.weight", _unused(1, mixture.in_features, required=True)
            yield f"{name}.bias", _unused(1, required=True)
        else:
            yield f"{name}.weight", _slot(router.weight[rows])
            yield f"{name}.bias", _slot(router.bias[rows])
        used.add(output)


def _copies_router_slots(layer: Any, adapter: str, name: str) -> Iterator[tuple[str, Slot]]:
    copies = layer.router_over_copies(adapter)
    if copies is not None:
        inner = ".topkroute_linear" if isinstance(copies.gating[adapter], TopK) else ""
        yield from _linear(f"{name}{inner}", copies.moa_w2[adapter])


def _lora_slots(layer: Any, adapter: str, path: str, lists: bool) -> Iterator[tuple[str, Slot]]:
    a, b = layer.moa_A[adapter].weight, layer.moa_B[adapter].weight
    number = layer.number_of_copies(adapter)
    shared = a.shape[0] < b.shape[1]
    name_a, name_b = ("lora_A_l.{}", "lora_B_l.{}") if number > 1 else ("lora_A", "lora_B")
    if lists:
        name_a, name_b = "experts.{}.lora_A", "experts.{}.lora_B"
    heads = _heads(layer)
    for copy, part in enumerate([a] if shared else a.chunk(number)):
        yield f"{path}.{'lora_A' if shared else name_a.format(copy)}.weight", _slot(part)
    for copy, part in enumerate(b.chunk(number, dim=1)):
        yield f"{path}.{name_b.format(copy)}.weight", _slot(part, heads)
    yield from _copies_router_slots(layer, adapter, f"{path}.router")
    copies = layer.router_over_copies(adapter)
    if copies is not None and adapter in copies.moa_threshold:
        yield from _linear(f"{path}.threshold_fn", copies.moa_threshold[adapter])
    if lists and copies is None:  # one expert, whose weight is always one
        for router in ("router.topkroute_linear", "router", "threshold_fn"):
            yield f"{path}.{router}.weight", _unused(1, a.shape[1])
            yield f"{path}.{router}.bias", _unused(1)


def _heads(layer: Any) -> int:
    config = layer.place.config
    queries: int = config.num_attention_heads
    return {"q": queries, "k": getattr(config, "num_key_value_heads", None) or queries}.get(layer.site, 0)


def _parallel_slots(layer: Any, adapter: str, path: str, lists: bool) -> Iterator[tuple[str, Slot]]:
    down, up = layer.moa_down[adapter], layer.moa_up[adapter]
    number = layer.number_of_copies(adapter)
    separate = number > 1 and down.weight.shape[0] == up.weight.shape[1]
    for copy in range(number if separate else 1):
        name = f"{path}.down_proj_l.{copy}" if separate else f"{path}.down_proj"
        yield f"{name}.weight", _slot(down.weight.chunk(number if separate else 1)[copy])
        yield f"{name}.bias", _slot(down.bias.chunk(number if separate else 1)[copy])
    for copy in range(number):
        name = f"{path}.up_proj_l.{copy}" if number > 1 else f"{path}.up_proj"
        yield f"{name}.weight", _slot(up.weight.chunk(number, dim=1)[copy])
        yield f"{name}.bias", _slot(up.bias[copy])
    yield from _copies_router_slots(layer, adapter, f"{path}.router")


def _prompt_slots(layer: Any, adapter: str, path: str, lists: bool) -> Iterator[tuple[str, Slot]]:
    prompt = layer.moa_prompt[adapter]
    yield f"{path}.weight", _slot(prompt.weight)
    yield f"{path}_gate", _slot(prompt.head_gate.view(1, -1, 1, 1))
    yield from _copies_router_slots(layer, adapter, f"{path}_router")


# Kind of expert -> its tensors, given a layer, an adapter, the path in a block, and `Checkpoint.expert_lists`.
EXPERT_SLOTS: dict[str, Callable[[Any, str, str, bool], Iterator[tuple[str, Slot]]]] = {
    "lora": _lora_slots,
    "parallel": _parallel_slots,
    "prompt": _prompt_slots,
}
