"""The recipes that ship with moa, and architecture numbers of the base models they name.

``configs/`` holds a ``config.json`` for each hub model that a recipe uses, so that a recipe can be validated without
a download. They describe shapes only; training always reads the model itself.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from moa.adapters.choices import nearest

__all__ = ["base_config", "find", "names"]

_FOLDER = Path(str(files(__name__)))


def names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find(source: str | Path) -> Path:
    """The file of a recipe, given its path or the name of a shipped one.

    Raises:
        FileNotFoundError: neither; names near ones.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    shipped = _FOLDER / f"{source}.yaml"
    if str(source) in names():
        return shipped
    siblings = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    raise FileNotFoundError(
        f"there is no recipe {str(source)!r}{nearest(path.name, [*names(), *siblings])}; "
        f"`moa recipes ls` lists those that ship with moa"
    )


def base_config(base: str) -> Path | None:
    """The shipped configuration of a hub model, or None."""
    path = _FOLDER / "configs" / f"{base.replace('/', '--')}.json"
    return path if path.is_file() else None
