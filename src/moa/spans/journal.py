"""A file of JSON lines that survives a kill: what makes the long steps resumable.

The first line holds the settings that the entries depend on. Every entry is on disk before the next one is computed; a
last line that a kill cut short is dropped when the file is opened again. No entry, no file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moa import files


class Journal:
    """Entries under fixed settings.

    Attributes:
        path: the file.
        settings: what the entries depend on.
        entries: what is in it, in the order of writing.

    Raises:
        ValueError: the file is no journal, is damaged before its last line, or was written under other settings (names
            the first that differs, with both values).
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.entries: list[dict[str, Any]] = []
        # What JSON does to tuples and keys must not look like a difference.
        self.settings = json.loads(json.dumps(settings))
        lines = read_lines(self.path, torn=True) if self.path.exists() else []
        if len(lines) > 1:  # without entries there is nothing to lose, whatever the settings were
            self._check(lines[0])
            self.entries = lines[1:]
            self._write()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Put one entry on disk."""
        if not self.entries:
            self._write()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(dict(entry))

    def _write(self) -> None:
        """The file as it is known: it appears whole or not at all."""
        files.write_text(self.path, "".join(map(_line, [{"settings": self.settings}, *self.entries])))

    def _check(self, first: Mapping[str, Any]) -> None:
        found = first.get("settings")
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} was not written by this step: its first line holds no settings")
        if (said := difference(found, self.settings)) is not None:
            raise ValueError(
                f"{self.path} was made with another setting: {said}; give --overwrite to start this step over"
            )


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first setting that differs, as ``"density was 0.5, now 0.35"``, inside of sections too; None if all agree."""
    for key in [*new, *(key for key in old if key not in new)]:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            return difference(before, now)
        return f"{key} was {_said(before)}, now {_said(now)}"
    return None


def _said(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value or "empty"


def settings_of(path: Path) -> dict[str, Any]:
    """The settings that a journal was written under; empty if there is no such file."""
    lines = read_lines(path, torn=True) if path.is_file() else []
    found = lines[0].get("settings") if lines else None
    return found if isinstance(found, dict) else {}


def read_lines(path: Path, *, torn: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; with ``torn``, without a last line that does not end.

    Raises:
        ValueError: a line is not a JSON object; names it.
    """
    found = []
    for place, entry in files.read_lines(path, torn=torn):
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: must be a JSON object, not {type(entry).__name__}")
        found.append(entry)
    return found


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, separators=(",", ":")) + "\n"
