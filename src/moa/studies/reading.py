"""From a YAML file to nested dataclasses, with errors that name what is wrong and what was probably meant."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moa.adapters.choices import nearest
from moa.training.knobs import numbers, parse


def read(path: Path) -> Any:
    """The plain data of a YAML file, numbers such as ``1e-4`` among them.

    Raises:
        FileNotFoundError: no such file; names a near one.
        ValueError: not YAML.
    """
    if not path.is_file():
        others = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no study {str(path)!r}{nearest(path.name, others)}")
    try:
        return numbers(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None


def build(cls: Any, tree: Any, prefix: str = "") -> Any:
    """``cls`` from nested mappings; every unknown key is a ValueError that offers the nearest valid one.

    A class that has a function ``KEY_from`` reads the key with it.
    """
    what = prefix.rstrip(".") or "a study"
    hints = typing.get_type_hints(cls)
    allowed = [entry.name for entry in dataclasses.fields(cls)]
    fields: dict[str, Any] = {}
    for key, value in mapping(what, tree).items():
        if key not in allowed:
            raise ValueError(f"{what} has no key {key!r}{nearest(key, allowed)}; its keys are {allowed}")
        if hasattr(cls, f"{key}_from"):
            fields[key] = getattr(cls, f"{key}_from")(value)
        elif dataclasses.is_dataclass(hints[key]):
            fields[key] = build(hints[key], value, f"{prefix}{key}.")
        else:
            fields[key] = mapping(key, value) if typing.get_origin(hints[key]) is dict else value
    return cls(**fields)


def override(tree: Any, key: str, text: str) -> None:
    """Set a dotted key of plain data to what ``text`` says in YAML."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {}) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        raise ValueError(f"--{key}: {'.'.join(sections) or 'the file'} is not a section with keys of its own")
    tree[last] = parse(text)


def mapping(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a mapping of keys to values, not {value!r}")
    return dict(value)


def listed(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list | None):
        raise ValueError(f"{what} must be a list, not {value!r}")
    return value or []
