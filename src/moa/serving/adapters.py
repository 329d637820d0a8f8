"""Which saved mixtures can be served, said before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from moa.adapters.config import MoAConfig
from moa.models import existing
from moa.training.base import WEIGHTS, check_folder
from moa.training.spans import plan_beside


def configuration(adapter: str | Path) -> MoAConfig:
    """The configuration of a saved mixture that an engine can serve.

    Args:
        adapter: its folder.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: it is no mixture, is damaged, or has something that no engine serves.
    """
    folder = Path(existing(str(adapter), "adapter"))
    if not folder.is_dir():
        raise FileNotFoundError(f"{adapter} is no folder on this machine: download the adapter, then serve its folder")
    check_folder(folder)
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, MoAConfig)
    refuse_unservable(config, str(adapter))
    if plan_beside(str(adapter)) is not None:
        raise ValueError(
            f"{adapter} was trained under a span plan, which no engine attends by: its answers would be others than "
            "those of `moa generate`. Serve an adapter that was trained with dense attention"
        )
    return config


def refuse_unservable(config: MoAConfig, name: str) -> None:
    """Raise ValueError if no engine can serve an adapter of this configuration."""
    way_out = "use `moa generate`, or train without it"
    if config.router is not None and config.router.level != "token":
        raise ValueError(
            f"{name} has a router of level {config.router.level!r}, which needs to know where each text begins, and an "
            f"engine runs tokens of many requests side by side. Levels that can be served: 'token'; {way_out}"
        )
    for field in ("modules_to_save", "trainable_token_indices"):
        value = getattr(config, field)
        if value:
            raise ValueError(f"{name} has {field}={value}: changes of the base model cannot be served; {way_out}")


def weights(adapter: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved mixture, by their names in the file."""
    return load_file(Path(existing(str(adapter), "adapter")) / WEIGHTS)


def fingerprint(configs: Sequence[MoAConfig]) -> str:
    """What shapes and compiled code of mixtures depend on, in their order."""
    said = ("experts", "router", "gating", "layers_to_transform", "architecture")
    fields = [{name: config.to_dict()[name] for name in said} for config in configs]
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
