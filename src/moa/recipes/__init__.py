"""The recipes that ship with moa, and architecture numbers of the base models they name.

``configs/`` holds a ``config.json`` for each hub model that a recipe uses, so that a recipe can be validated without
a download. They describe shapes only; training always reads the model itself.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from moa.choices import nearest

__all__ = ["base_config", "find", "names"]

_FOLDER = Path(str(files(__name__)))
_SHIPPED = {"recipe": "*.yaml", "span recipe": "spans/*.yaml"}


def names(kind: str = "recipe") -> list[str]:
    """Names of the shipped recipes.

    Args:
        kind: ``"recipe"``, ``"span recipe"``, or ``"study"``, of which none ships.
    """
    return sorted(path.stem for path in _FOLDER.glob(_SHIPPED[kind])) if kind in _SHIPPED else []


def find(source: str | Path, kind: str = "recipe") -> Path:
    """The file of a recipe, given its path or the name of a shipped one.

    Args:
        source: path or name.
        kind: as for `names`.

    Raises:
        FileNotFoundError: neither; names near ones.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    shipped = names(kind)
    if str(source) in shipped:
        return (_FOLDER / _SHIPPED[kind]).with_name(f"{source}.yaml")
    siblings = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    known = f"; those that ship with moa are {shipped}" if shipped else ""
    raise FileNotFoundError(f"there is no {kind} {str(source)!r}{nearest(path.name, [*shipped, *siblings])}{known}")


def base_config(base: str) -> Path | None:
    """The shipped configuration of a hub model, or None."""
    path = _FOLDER / "configs" / f"{base.replace('/', '--')}.json"
    return path if path.is_file() else None
