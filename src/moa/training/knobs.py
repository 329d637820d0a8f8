"""Dataclass fields that know their documentation and their limits, and how to read them from YAML or a flag."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import yaml

from moa.adapters.choices import check_choice, check_range

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class Range(NamedTuple):
    """Limits of a number; ``open_low`` excludes the lower one."""

    low: float
    high: float = float("inf")
    open_low: bool = False


def knob(default: Any, doc: str, *, within: Range | None = None, choices: Collection[str] | None = None) -> Any:
    """A dataclass field that carries its documentation and its limits."""
    return dataclasses.field(default=default, metadata={"doc": doc, "within": within, "choices": choices})


def knobs(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Dotted name and field of every knob of a dataclass, sections included."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from knobs(hints[field.name], f"{name}.")
        else:
            yield name, field


def check(section: Any, prefix: str = "") -> None:
    """Bring every field of a dataclass to its declared type and check its limits.

    Raises:
        ValueError: naming the knob, the value, and what is allowed.
    """
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        if "doc" not in field.metadata:
            continue
        name = f"{prefix}{field.name}"
        value = _typed(name, getattr(section, field.name), hints[field.name])
        setattr(section, field.name, value)
        if value is None:
            continue
        if choices := field.metadata.get("choices"):
            check_choice(name, value, choices)
        if within := field.metadata.get("within"):
            check_range(name, value, **within._asdict())


def parse(text: str) -> Any:
    """A flag's text as YAML would read it, and numbers such as ``1e-4`` as numbers."""
    try:
        return numbers(yaml.safe_load(text))
    except yaml.YAMLError:
        return text


def numbers(tree: Any) -> Any:
    """``tree`` with texts such as ``"1e-4"`` as numbers: YAML 1.1 takes an exponent without a point for text."""
    if isinstance(tree, dict):
        return {key: numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [numbers(value) for value in tree]
    return float(tree) if isinstance(tree, str) and _EXPONENT.fullmatch(tree) else tree


def _typed(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    origin = typing.get_origin(kind) or kind
    if origin is list:
        return [
            _typed(name, item, typing.get_args(kind)[0]) for item in (value if isinstance(value, list) else [value])
        ]
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if origin is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        wanted = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
        raise ValueError(f"{name}={value!r} must be {wanted.get(origin.__name__, origin.__name__)}")
    return value


def describe(cls: type) -> Iterator[tuple[str, str, str]]:
    """Dotted name, default and documentation with limits of every knob, for a help page."""
    for name, field in knobs(cls):
        default = field.default_factory() if callable(field.default_factory) else field.default
        doc = field.metadata["doc"]
        if field.metadata.get("choices") is not None:
            doc = f"{doc}: {', '.join(field.metadata['choices'])}"
        if field.metadata.get("within") is not None:
            doc = f"{doc} ({_limits(field.metadata['within'])})"
        yield name, "" if default is None else yaml.safe_dump(default, default_flow_style=True).split("\n")[0], doc


def _limits(within: Range) -> str:
    low = f"{'above' if within.open_low else 'at least'} {within.low:g}"
    return low if within.high == float("inf") else f"{low}, at most {within.high:g}"
