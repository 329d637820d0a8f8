"""Adapter folders of the official implementation, read without running anything that is in them.

Its native path writes `adapter.pth` and `adapter_params.json` (`extract_adapter_from_checkpoint.py`), its transformers
path `adapter_model.bin` and `adapter_config.json`. Safetensors under the same stems are read too.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moa.adapters.config import MoAConfig
from moa.adapters.reference.settings import VARIANTS, reference_config
from moa.adapters.reference.weights import load_reference
from moa.choices import check_choice
from moa.files import read_json

WEIGHTS = ("adapter.safetensors", "adapter.pth", "adapter_model.safetensors", "adapter_model.bin")
SETTINGS = ("adapter_params.json", "adapter_config.json")


def import_reference(
    source: str | Path,
    base: str | Path,
    output: str | Path,
    variant: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> MoAConfig:
    """Write the official adapter in ``source`` to ``output`` as an ordinary MoA adapter.

    The base model's weights are not read: only its configuration is, so a laptop can import an adapter of any size.

    Args:
        source: a folder of the official implementation, or the file with the weights in it; ``.pth`` and ``.bin`` are
            read as tensors only.
        base: the base model, a name on the Hub or a folder; noted in the result.
        output: a folder, created if needed.
        variant: see `reference_config`. None: found out from the files, which is not possible for every one.
        settings: official settings that are not in the folder, or that differ from it.

    Returns:
        The configuration that was saved.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: unreadable files, a variant that cannot be told, or tensors that do not fit the settings.
    """
    weights = _find(Path(source), WEIGHTS)
    if weights is None:
        raise FileNotFoundError(f"{source}: neither weights nor a folder with one of {list(WEIGHTS)}")
    tensors = _read_tensors(weights)
    recorded = _read_settings(weights.parent)
    variant = find_variant(tensors, recorded) if variant is None else variant
    check_choice("variant", variant, VARIANTS)
    if not variant.startswith("LLaMA3"):  # these files ignore their configuration and hard-code most of it
        recorded = _transformers_settings(tensors)
    config = reference_config(variant, {**recorded, **(settings or {})})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    adapted = get_peft_model(model, config)
    load_reference(adapted, tensors)
    config.base_model_name_or_path = str(base)
    adapted.save_pretrained(str(output))
    return config


def find_variant(tensors: Iterable[str], settings: Mapping[str, Any]) -> str:
    """The official model file that an adapter was made with.

    Args:
        tensors: names of its tensors.
        settings: what its `adapter_params.json` says, empty for the transformers path.

    Raises:
        ValueError: soft and instance-level MoA write the same names and settings; the user has to say which.
    """
    names = list(tensors)
    if any(".self_attn." in name or ".mlp." in name for name in names):
        return "sparse" if any("adapter_threshold_fn" in name for name in names) else "soft"
    if any(".lora_gate." in name for name in names):
        return "LLaMA3_UniPEFT"
    if "adamole" in settings or any(".experts." in name for name in names):
        return "LLaMA3_sparse_moe"
    if "max_threshold" in settings or any("adapter_threshold_fn" in name for name in names):
        return "LLaMA3_sparse_moa"
    if any("adapter_type_router" in name for name in names):
        raise ValueError(
            "cannot tell from its files whether this adapter is LLaMA3_soft_moa or LLaMA3_soft_moa_instance: say so "
            "with the variant"
        )
    return "LLaMA3_soft_moe"


def _transformers_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What users of the transformers path edit in its files: prompt and router; the rest is checked by shape."""
    prompts = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith("self_attn.prompt.weight")]
    linear = any(name.endswith("adapter_type_router.weight") for name in tensors)
    return {"prompt_len": prompts[0] if prompts else None, "swi_x": 0 if linear else None}


def _find(source: Path, names: tuple[str, ...]) -> Path | None:
    if source.is_file():
        return source
    return next((source / name for name in names if (source / name).is_file()), None)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, which loading could run as code, so it was not read. If it is a whole "
            "training checkpoint, run the official extract_adapter_from_checkpoint.py on it first."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is not a plain dictionary of tensors")
    return tensors


def _read_settings(folder: Path) -> dict[str, Any]:
    path = _find(folder, SETTINGS)
    if path is None:
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(settings).__name__}")
    return settings
