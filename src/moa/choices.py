"""Checks that every configuration shares: errors that name the offending value and the allowed ones."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def named(place: str) -> Iterator[None]:
    """Begin the messages of what is refused inside with where it stands."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def first_line(error: BaseException) -> str:
    """What an error says in short, or what it is if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"``, or nothing if no allowed name is close."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_choice(what: str, value: Any, allowed: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in list(allowed):  # which asks no hash of a value that has none
        raise ValueError(f"{what}={value!r} is not one of {sorted(allowed)}{nearest(value, allowed)}")


def check_names(what: str, names: Any, allowed: Collection[str]) -> None:
    """Raise ValueError unless ``names`` lists one or more of ``allowed``, each once."""
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"{what}={names!r} must be a list of {list(allowed)}")
    for name in names:
        check_choice(what, name, allowed)
        if list(names).count(name) > 1:
            raise ValueError(f"{what}={names!r} names {name!r} twice")


def check_flag(what: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False; a word such as "no" would count as True."""
    if not isinstance(value, bool):
        raise ValueError(f"{what}={value!r} must be True or False")


def numbers(what: str, given: Any, of: str) -> list[int]:
    """One number, counted from 0, or a list of them, as a list.

    Args:
        what: the setting, for the message.
        given: its value.
        of: what is numbered, e.g. ``"a block"``.

    Raises:
        ValueError: it is neither, or no number at all.
    """
    found = list(given) if isinstance(given, list | tuple | range) else [given]
    if not found or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in found):
        raise ValueError(f"{what}={given!r} must be the number of {of}, counted from 0, or a list of such numbers")
    return found


def check_range(
    what: str, value: float, *, low: float, high: float = float("inf"), open_low: bool = False, whole: bool = False
) -> None:
    """Raise ValueError unless ``low <= value <= high`` (``low < value`` if ``open_low``); ``whole``: an integer."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{what}={value!r} must be a {'whole ' if whole else ''}number")
    if value in (math.inf, -math.inf):
        raise ValueError(f"{what}={value!r} must be a finite number")
    if value != value or value < low or value > high or (open_low and value == low):
        left = "(" if open_low else "["
        raise ValueError(f"{what}={value!r} is outside of {left}{low}, {high}]")


def build(what: str, classes: Mapping[str, type], given: Any) -> Any:
    """An instance of one of ``classes`` from an instance, a kind's name, or a dict with the key ``kind``.

    Raises:
        ValueError: unknown kind or unknown field; the message offers the nearest valid name.
    """
    if isinstance(given, tuple(classes.values())):
        return given
    fields: dict[str, Any] = {"kind": given} if isinstance(given, str) else dict(_mapping(what, given))
    kind = fields.pop("kind", None)
    check_choice(f"{what}: kind", kind, classes)
    return from_fields(f"{what} {kind!r}", classes[kind], fields)


def from_fields(what: str, cls: type, fields: Mapping[str, Any]) -> Any:
    """``cls(**fields)``; an unknown field is a ValueError that offers the nearest valid one."""
    check_fields(what, cls, _mapping(what, fields))
    return cls(**fields)


def _mapping(what: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what}={given!r} must be a mapping of its settings")
    return given


def check_fields(what: str, cls: type, names: Iterable[str]) -> None:
    """Raise ValueError unless every one of ``names`` is a field of the dataclass ``cls``."""
    allowed = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in allowed:
            raise ValueError(f"{what} has no field {name!r}{nearest(name, allowed)}; its fields are {allowed}")


def plain(value: Any) -> Any:
    """Dataclasses to JSON-able dicts, each with its ``kind`` if it has one; the inverse of `build`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        kind = getattr(value, "kind", None)
        return fields if kind is None else {"kind": kind, **fields}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
