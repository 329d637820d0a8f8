"""A file of JSON lines that survives a kill: what makes the long steps resumable.

The first line holds the settings that the entries depend on. Every entry is on disk before the next one is computed; a
last line that a kill cut short is dropped when the file is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Entries under fixed settings.

    Attributes:
        path: the file.
        entries: what is in it, in the order of writing.

    Raises:
        ValueError: the file is no journal, is damaged before its last line, or was written under other settings (names
            the first that differs, with both values).
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.entries: list[dict[str, Any]] = []
        # What JSON does to tuples and keys must not look like a difference.
        wanted = json.loads(json.dumps(settings))
        lines = read_lines(self.path, torn=True) if self.path.exists() else []
        if len(lines) > 1:  # without entries there is nothing to lose, whatever the settings were
            self._check(lines[0], wanted)
            self.entries = lines[1:]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text("".join(_line(entry) for entry in [{"settings": wanted}, *self.entries]), encoding="utf-8")
        draft.replace(self.path)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Put one entry on disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(dict(entry))

    def _check(self, first: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        found = first.get("settings")
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} was not written by this step: its first line holds no settings")
        for key in [*wanted, *found]:
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"{self.path} was made with another setting: {key} was {found.get(key)!r}, now it is "
                    f"{wanted.get(key)!r}; give --overwrite to start this step over"
                )


def read_lines(path: Path, *, torn: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; with ``torn``, without a last line that does not end.

    Raises:
        ValueError: a line is not a JSON object; names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines[:-1] if torn else lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object, not {type(entry).__name__}")
        found.append(entry)
    return found


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n"
