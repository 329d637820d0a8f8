"""The recipe's ``adapter`` section: a preset with changes, or a whole `MoAConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moa.adapters.choices import from_fields
from moa.adapters.config import MoAConfig
from moa.adapters.presets import preset


def adapter_config(section: Mapping[str, Any]) -> MoAConfig:
    """A fresh configuration.

    Args:
        section: with the key ``preset``, its other keys are changes to that preset. Without it, the fields of
            `MoAConfig`.

    Raises:
        ValueError: an unknown preset, key or kind, or a value outside of its range.
    """
    fields = dict(section)
    name = fields.pop("preset", None)
    if name is None:
        return from_fields("adapter", MoAConfig, fields)
    return preset(str(name), **fields)
