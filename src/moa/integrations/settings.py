"""The ``moa`` section that every tool's configuration gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftConfig

from moa.adapters.presets import adapter_config
from moa.files import parsed


def mixture(section: Any) -> PeftConfig:
    """The configuration that a ``moa`` section describes.

    Args:
        section: a preset's name, ``{"preset": ..., changes}``, fields of `MoAConfig`, or one of these as JSON.

    Raises:
        ValueError: it is none of these; the message names the wrong key or value.
    """
    if isinstance(section, str) and section.lstrip().startswith("{"):
        section = parsed(section, "moa")
    if isinstance(section, str):
        section = {"preset": section}
    if not isinstance(section, Mapping) or not section:
        raise ValueError(f"moa={section!r} must be a preset's name, such as soft-moa, or a mapping, e.g. preset and r")
    return adapter_config(section)


def refuse_lora(given: Iterable[str]) -> None:
    """Raise ValueError for settings of a tool's own LoRA, which a mixture would ignore."""
    if names := sorted(given):
        raise ValueError(
            f"{', '.join(names)}: a mixture does not read the settings of LoRA. Take them out and write what you want "
            "in the moa section, e.g. moa: {preset: soft-moa, r: 16, targets: [q, v]}"
        )
