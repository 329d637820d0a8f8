"""Names that may be a path or ``owner/name`` on the hub. Needs nothing, so that a wrong name is told at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moa.choices import nearest


def existing(name: str, what: str, names: Sequence[str] = ()) -> str:
    """``name`` as a path if there is one, or as it is if it may be on the hub.

    Args:
        name: a path, or ``owner/name``.
        what: what it should be, for the message.
        names: other names that would have been right, for the message.

    Raises:
        FileNotFoundError: neither; names near ones.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if on_hub(name):
        return name
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FileNotFoundError(f"there is no {what} {name!r}{nearest(path.name, [*names, *siblings])}")


def on_hub(name: str) -> bool:
    """Whether ``name`` can only be ``owner/name`` on the hub: there is no such path, and it does not look like one."""
    looks_like_path = name.startswith((".", "~", "/")) or name.endswith(".gguf")
    return name.count("/") == 1 and not looks_like_path and not Path(name).exists()
