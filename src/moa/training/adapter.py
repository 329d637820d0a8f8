"""The recipe's ``adapter`` section: a preset with changes, a whole `MoAConfig`, or a method of PEFT's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
from peft import PeftConfig

from moa.adapters.config import MoAConfig
from moa.adapters.presets import preset
from moa.choices import check_choice, from_fields

# What is compared with from outside; the places are those of moa's presets, as most families call them.
PEFT_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft:lora": ("LoraConfig", {}),
    "peft:dora": ("LoraConfig", {"use_dora": True}),
    "peft:lily": ("LilyConfig", {}),
}
_PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


def adapter_config(section: Mapping[str, Any]) -> PeftConfig:
    """A fresh configuration.

    Args:
        section: with the key ``preset``, its other keys are changes to that preset, or, for a preset such as
            ``peft:lora``, fields of PEFT's own configuration. Without it, the fields of `MoAConfig`.

    Raises:
        ValueError: an unknown preset, key or kind, or a value outside of its range.
    """
    fields = dict(section)
    name = fields.pop("preset", None)
    if name is None:
        return from_fields("adapter", MoAConfig, fields)
    if str(name).startswith("peft:"):
        return _of_peft(str(name), fields)
    return preset(str(name), **fields)


def _of_peft(name: str, fields: dict[str, Any]) -> PeftConfig:
    check_choice("preset", name, PEFT_METHODS)
    kind, fixed = PEFT_METHODS[name]
    if not hasattr(peft, kind):
        raise ValueError(f"preset {name!r} needs a newer PEFT than {peft.__version__}")
    defaults = {"task_type": "CAUSAL_LM", "target_modules": list(_PLACES)}
    config: PeftConfig = from_fields(f"preset {name!r}", getattr(peft, kind), defaults | fixed | fields)
    return config
