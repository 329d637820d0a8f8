"""Which model is this? Digests that tell a model from another one, whatever it is called and wherever it lies.

Two questions need two answers. *Did exactly this model produce these numbers?* is asked by journals: `identity` covers
every weight and every adapter, in the state they are in. *Was this plan made for this kind of model?* is asked where a
plan is applied: `family` looks at the input embeddings alone, which adapters and most fine-tuning leave as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 1024  # rows of the embeddings
PLACES = ("base_model_name_or_path", "inference_mode", "revision")  # settings of an adapter that change no number


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
    return flat.view(torch.uint8).sum(1, dtype=torch.int64).cpu().numpy().tobytes()
