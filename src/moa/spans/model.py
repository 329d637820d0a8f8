"""What a plan must know about a model: the shape of its attention, and which model it is.

Two questions about the latter need two answers. *Did exactly this model produce these numbers?* is asked by journals:
`identity` covers every weight and every adapter, in the state they are in. *Was this plan made for this kind of model?*
is asked where a plan is applied: `family` looks at the input embeddings alone, which adapters and most fine-tuning
leave as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FULL = "full_attention"
SLIDING = "sliding_attention"
SAMPLED = 1024  # rows of the embeddings
AT_A_TIME = 2**16  # bytes of weights
PLACES = ("base_model_name_or_path", "inference_mode", "revision")  # settings of an adapter that change no number


@dataclass(frozen=True)
class ModelShape:
    """The attention of a decoder.

    Attributes:
        layers: decoder layers.
        query_heads: query heads of a layer.
        kv_heads: key and value heads of a layer.
        head_dim: width of one head.
        windows: per layer the tokens of its own sliding window, or None where it sees everything.
        context: the longest text the model was made for, None if it does not say.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    context: int | None

    @classmethod
    def of(cls, model_or_config: Any) -> ModelShape:
        """Read a model or its configuration.

        Raises:
            ValueError: a layer that is neither full nor sliding attention, latent attention, heads that cannot be
                grouped, or that differ from layer to layer.
        """
        config = getattr(model_or_config, "config", model_or_config)
        config = config.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None):
            raise ValueError(f"{config.model_type}: latent attention has no KV heads that could have spans")
        _check_alike(config)
        layers, query_heads = config.num_hidden_layers, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
        if query_heads % kv_heads:
            raise ValueError(f"{config.model_type}: {query_heads} query heads cannot share {kv_heads} KV heads evenly")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
        context = getattr(config, "max_position_embeddings", None)
        return cls(layers, query_heads, kv_heads, head_dim, _windows(config, layers), context)

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads


def _check_alike(config: Any) -> None:
    """Raise ValueError if layers have heads of their own, as a configuration with ``per_layer_config`` can say."""
    if not getattr(config, "is_heterogeneous", False):
        return
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
        if len(set(values)) > 1:
            raise ValueError(
                f"{config.model_type}: {name} is {values} in its layers; spans need the same in all of them"
            )


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * layers
    for layer, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            raise ValueError(f"{config.model_type}: layer {layer} is {kind!r}; spans need {FULL!r} or {SLIDING!r}")
    return tuple(window if kind == SLIDING else None for kind in types)


def identity(model: Any) -> dict[str, str]:
    """Name, dtype, and a digest of all weights, of the adapters among them and of whether these are switched on."""
    return {
        "model": str(model.config._name_or_path),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _digest_of_all(model),
    }


def family(model: Any) -> str:
    """A digest of the model's first input embeddings, the same in float32 and bfloat16."""
    sample = model.get_input_embeddings().weight[:SAMPLED].detach().to(torch.bfloat16)
    if sample.is_meta:
        return "offloaded"
    return hashlib.sha256(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _digest_of_all(model: nn.Module) -> str:
    said = hashlib.sha256()
    for name, tensor in sorted(itertools.chain(model.named_parameters(), model.named_buffers())):
        said.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        said.update(_row_sums(tensor.detach()))
    for name, module in model.named_modules():
        if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters"):
            state = [module.active_adapters, module.disable_adapters, getattr(module, "merged_adapters", None)]
            said.update(f"{name} {state} {getattr(module, 'scaling', None)}".encode())
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        settings = {key: value for key, value in config.to_dict().items() if key not in PLACES}
        said.update(f"{name} {json.dumps(settings, sort_keys=True, default=str)}".encode())
    return said.hexdigest()[:16]


def _row_sums(tensor: Tensor) -> bytes:
    """Sums of the bytes of every row: all of the weights are read once, and little of them is moved."""
    flat = tensor.contiguous().reshape(max(tensor.shape[0], 1) if tensor.dim() else 1, -1)
    if tensor.is_meta or not flat.numel():  # weights that are kept on disk are told by name and shape alone
        return b""
    numbers = flat.view(torch.uint8)
    some = max(AT_A_TIME // numbers.shape[1], 1)  # a sum of bytes as int64 first makes int64 of them all
    return torch.cat([rows.sum(1, dtype=torch.int64) for rows in numbers.split(some)]).cpu().numpy().tobytes()
