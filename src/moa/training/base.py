"""Base models and adapters from disk or hub, and one clear line for whatever is wrong with them.

Weights are read from safetensors or GGUF, never from pickles, and no code that comes with a model is ever run.
"""

from __future__ import annotations

import importlib.util
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from moa.adapters.config import MoAConfig
from moa.choices import check_choice, first_line
from moa.files import read_json
from moa.models import load
from moa.places import existing
from moa.training.checkpoints import WEIGHTS

CONFIG = "adapter_config.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"auto"``: bfloat16 where an accelerator computes in it, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    check_choice("dtype", dtype, ["auto", *_DTYPES])
    if dtype != "auto":
        return _DTYPES[dtype]
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def emulates_bfloat16() -> bool:
    """Whether this machine has no accelerator, and a processor that only imitates bfloat16: products there take six
    times as long as in float32, whole training steps more (measured on one with AVX2 alone).
    """
    if torch.accelerator.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def load_base(
    name: str, dtype: str | torch.dtype = "auto", device_map: str | None = None, four_bit: bool = False
) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model and its tokenizer.

    Args:
        name: a folder, a ``.gguf`` file, ``owner/name`` on the hub, or the name of a model that moa knows; see
            `moa.models.find`.
        dtype: a torch dtype or its name; ``auto`` as in `resolve_dtype`.
        device_map: as in transformers; "auto" is None where there is no accelerator.
        four_bit: quantise the weights to NF4 with bitsandbytes.

    Returns:
        The model, and the tokenizer with a padding token (end-of-text where it has none of its own).

    Raises:
        ValueError: the model cannot be loaded; says from where and why.
        FileNotFoundError: there is no such model.
    """
    if device_map == "auto" and not torch.accelerator.is_available():
        device_map = None
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype), "device_map": device_map}
    if options["dtype"] is torch.bfloat16 and emulates_bfloat16():
        warnings.warn(
            "this processor has no bfloat16 instructions and is many times slower in it: use dtype float32",
            stacklevel=2,
        )
    if four_bit:
        options["quantization_config"] = _four_bit()
    model, tokenizer = load(name, **options)
    # What PEFT writes into adapter_config.json: the name that works everywhere, not this machine's path.
    model.name_or_path = model.config._name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_adapter(base_model: PreTrainedModel, path: str | Path) -> PeftModel:
    """A trained Mixture of Adapters on its base model, in evaluation mode.

    Args:
        base_model: from `load_base`.
        path: a folder that `moa.training.sft.train` or ``save_pretrained`` wrote, or ``owner/name`` on the hub.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: the configuration is of another PEFT method or a newer moa, the weights are damaged, or they belong
            to another base model (naming the tensor and both shapes).
    """
    source = existing(str(path), "adapter")
    if Path(source).is_dir():
        check_folder(Path(source))
    try:
        model = PeftModel.from_pretrained(base_model, source)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    except (OSError, KeyError, TypeError, RuntimeError) as error:  # PEFT looks for what a configuration promises
        raise ValueError(f"cannot load the adapter {source!r}: {type(error).__name__}: {first_line(error)}") from error
    for name, parameter in model.named_parameters():
        if ".moa_" in name and not torch.isfinite(parameter).all():
            raise ValueError(
                f"{source}: the tensor {name} is not finite: the weights are damaged, or training diverged"
            )
    return model


def adapter_base(path: str | Path) -> str | None:
    """The name of the base model that an adapter on disk was trained on, if its configuration has one."""
    return _read_config(Path(existing(str(path), "adapter"))).get("base_model_name_or_path")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG} is missing")
    try:
        fields = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is damaged: it must hold an object, not {type(fields).__name__}")
    return fields


def check_folder(folder: Path) -> None:
    """Everything that can be said before the base model is touched."""
    kind = _read_config(folder).get("peft_type")
    if kind != "MOA":
        raise ValueError(f"{folder / CONFIG} is of the PEFT method {kind!r}, not a Mixture of Adapters (MOA)")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    assert isinstance(config, MoAConfig)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no weights: {WEIGHTS} is missing")
    try:
        with safe_open(weights, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged or incomplete ({error}); copy or download it again") from error


def _four_bit() -> BitsAndBytesConfig:
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("four_bit needs an accelerator and the package bitsandbytes (pip install bitsandbytes)")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
