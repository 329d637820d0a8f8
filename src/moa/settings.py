"""Settings files: one dataclass each, checked by pydantic, read from YAML and flags, with help page and JSON Schema.

A class of settings is a dataclass under `settings` whose fields are `knob`s. A section is a field of such a class.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from moa.choices import named, nearest
from moa.extras import extra
from moa.files import read_text, write_text

with extra("train"):
    import yaml
    from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
    from pydantic.dataclasses import dataclass
    from pydantic.fields import FieldInfo

T = TypeVar("T")

MOST, DEEPEST = 100_000, 40  # values in a file, and levels of them
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}


def _one_or_many(schema: dict[str, Any]) -> None:
    items = schema.pop("items")
    schema["anyOf"] = [{"type": schema.pop("type"), "items": items}, items]


Several = Annotated[
    list[T],
    BeforeValidator(lambda given: given if isinstance(given, list) else [given]),
    Field(json_schema_extra=_one_or_many),
]
"""A list; one value alone may be written without brackets."""


class _Loader(yaml.SafeLoader):
    """YAML, of which a key that is there twice is none: the first would be dropped."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def knob(default: Any, doc: str, **limits: float) -> Any:
    """A field with its documentation.

    Args:
        default: a value, or for lists, mappings and sections a function that makes one.
        doc: for the help page and the schema.
        limits: of a number: ``gt``, ``ge``, ``lt``, ``le``.
    """
    options: dict[str, Any] = {"default_factory" if callable(default) else "default": default, "description": doc}
    if limits or isinstance(default, bool):
        options |= {"strict": True, **limits}
    return Field(**options)


@dataclass_transform(field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """A dataclass whose fields are checked; what is wrong is a ValueError of one line for each wrong field."""
    config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)
    made: Any = dataclass(config=config)(cls)
    build = made.__init__

    @wraps(build)
    def init(self: Any, *args: Any, **fields: Any) -> None:
        try:
            build(self, *args, **fields)
        except ValidationError as error:
            raise ValueError("\n".join(_explained(made, one) for one in error.errors())) from None

    made.__init__ = init
    return made  # type: ignore[no-any-return]


def load(cls: type[T], path: Path, overrides: Mapping[str, Any] | None = None) -> T:
    """Settings from a YAML file, with flags laid over it.

    Args:
        cls: a class of settings.
        path: an existing file.
        overrides: dotted key to text, or to a list of texts, e.g. ``{"learning-rate": "1e-4", "adapter.r": "16"}``. The
            file's own names, such as ``methods.soft-moa``, are theirs; in all others ``-`` is ``_``.

    Raises:
        ValueError: not YAML, an unknown key (the nearest valid one is offered), or a value outside of its range; the
            message starts with the file's name.
    """
    with named(path.name):
        tree = read(path)
        for key, given in (overrides or {}).items():
            texts = [
                _parsed(text, as_text=_takes_text(cls, key)) for text in ([given] if isinstance(given, str) else given)
            ]
            _override(tree, key, texts[0] if isinstance(given, str) else texts)
        return cls(**tree)


def read(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, numbers such as ``1e-4`` as numbers.

    Raises:
        ValueError: not YAML, or no mapping.
    """
    text = read_text(path)
    try:
        tree = yaml.load(text, _Loader)
    except Exception as error:  # PyYAML's, or whatever a tag like !!bool makes of a wrong text there
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    found = {} if tree is None else _numbers(tree)
    if not isinstance(found, dict):
        raise ValueError(f"the file must be a mapping of keys to values, not {found!r}")
    return found


def save(values: Any, path: Path) -> None:
    """Write every key, beside what was made with them, so that it can be made again."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(values), sort_keys=False, allow_unicode=True))


def describe(cls: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted name, default and documentation with limits of every key, for a help page."""
    for name, field in cls.__pydantic_fields__.items():
        if dataclasses.is_dataclass(field.annotation):
            yield from describe(field.annotation, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "" if default is None else yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
        yield f"{prefix}{name}", shown, _documented(field)


def schema(cls: Any) -> dict[str, Any]:
    """JSON Schema of the settings, for editors."""
    return TypeAdapter(cls).json_schema()


def _documented(field: FieldInfo) -> str:
    choices = [str(choice) for choice in getattr(field.annotation, "__args__", ()) if isinstance(choice, str)]
    limits = [(word, getattr(limit, key, None)) for limit in field.metadata for key, word in _LIMITS.items()]
    words = [f"{word} {value:,.10g}" for word, value in limits if value is not None]
    words += [f"one of {', '.join(choices)}"] if choices else []
    return f"{field.description} ({', '.join(words)})" if words else str(field.description)


def _explained(cls: Any, error: Any) -> str:
    """What pydantic found, with the key, its value, and what is allowed."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    *sections, last = error["loc"] or ("",)
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error["loc"]).lstrip(".")
    if kind == "value_error":
        return str(context["error"])
    if kind == "unexpected_keyword_argument":
        section, keys = name.removesuffix(last).rstrip("."), _keys(cls, sections)
        return f"{section or 'the file'} has no key {last!r}{nearest(last, keys)}; its keys are {keys}"
    if kind in ("dataclass_type", "dict_type"):
        return f"{name} must be a mapping of keys to values, not {given!r}"
    if kind == "list_type":
        return f"{name} must be a list, not {given!r}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return f"{name}={given!r} is not one of {allowed}{nearest(str(given), allowed)}"
    if limits := [f"{word} {context[key]:g}" for key, word in _LIMITS.items() if key in context]:
        return f"{name}={given!r} is outside of its range: {limits[0]}"
    wanted = _WANTED.get(kind.split("_")[0])
    return f"{name}={given!r} must be {wanted}" if wanted else f"{name}={given!r}: {error['msg']}"


def _keys(cls: Any, sections: list[Any]) -> list[str]:
    """Keys of the section that a path of an error leads to."""
    for step in sections:
        inside = typing.get_args(cls)
        cls = inside[-1] if inside else cls.__pydantic_fields__[step].annotation
    return list(cls.__pydantic_fields__)


def _override(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; sections that were given by a name alone become mappings first."""
    *sections, last = key.split(".")
    for step in sections:
        section = _named(step, tree)
        inner = tree.get(section)
        if isinstance(inner, str):
            inner = {"preset" if section == "adapter" else "kind": inner}
        tree[section] = {} if inner is None else inner
        if not isinstance(tree[section], dict):
            raise ValueError(f"--{key}: {section!r} is not a section with keys of its own")
        tree = tree[section]
    tree[_named(last, tree)] = value


def _named(step: str, tree: dict[str, Any]) -> str:
    return step if step in tree else step.replace("-", "_")


def _takes_text(cls: Any, key: str) -> bool:
    """Whether a dotted key is one of text, or of a list of texts."""
    for step in key.replace("-", "_").split("."):
        field = getattr(cls, "__pydantic_fields__", {}).get(step)
        cls = None if field is None else field.annotation
    return cls is str or str in typing.get_args(cls)


def _parsed(text: str, *, as_text: bool = False) -> Any:
    """A flag's text as YAML would read it; ``as_text``: but "1.10", "010", "no" and 2024-11-30 as they are written."""
    try:
        found = _numbers(yaml.load(text, _Loader))
    except Exception:
        return text
    return found if not as_text or isinstance(found, str | list | dict | None) else text


def _numbers(tree: Any, depth: int = 0, count: Iterator[int] | None = None) -> Any:
    """``tree`` with texts such as ``"1e-4"`` as numbers: YAML 1.1 takes an exponent without a point for text.

    Raises:
        ValueError: it is nested too deeply, or grows beyond measure by aliases that repeat one another.
    """
    count = count or itertools.count(1)
    if depth > DEEPEST or next(count) > MOST:
        raise ValueError(f"more than {MOST:,} values, or nested deeper than {DEEPEST} levels")
    if isinstance(tree, dict):
        return {str(key): _numbers(value, depth + 1, count) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_numbers(value, depth + 1, count) for value in tree]
    if not isinstance(tree, str) or not _EXPONENT.fullmatch(tree):
        return tree
    number = float(tree)
    return int(number) if number.is_integer() else number
