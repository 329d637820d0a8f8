"""Files, read whole or refused by name and written whole or not at all, and folders for one process at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK = ".lock"


def check_file(path: Path, what: str = "file") -> None:
    """Raise unless ``path`` is an ordinary file; reading a pipe or a device may never end.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, a pipe, a device.
    """
    if path.is_file():
        return
    if path.exists():
        raise ValueError(f"{path} is a folder or a device, not a {what}")
    raise FileNotFoundError(f"there is no {what} {str(path)!r}")


def read_text(path: Path, what: str = "file") -> str:
    """UTF-8 text, without the byte order mark with which tools on Windows begin.

    Raises:
        FileNotFoundError: as `check_file`.
        ValueError: as `check_file`, or it is not UTF-8; names the file.
    """
    check_file(path, what)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None


def read_json(path: Path, what: str = "file") -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: as `check_file`.
        ValueError: as `read_text`, or it is not JSON; names the file.
    """
    return parsed(read_text(path, what), str(path))


def parsed(text: str | bytes, place: str) -> Any:
    """What JSON text holds; what is wrong with it is a ValueError that begins with ``place``. So is a key that is there
    twice, of which the last would be taken without a word.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"{place}: not JSON (nested too deeply)") from None
    except ValueError as error:  # a number of too many digits is one, too
        raise ValueError(f"{place}: not JSON ({error})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def read_lines(path: Path, what: str = "file of JSON lines", *, torn: bool = False) -> Iterator[tuple[str, Any]]:
    """The place of every line that is not empty, for messages, and what it holds.

    Args:
        path: a file of JSON lines.
        what: what it should be, for messages.
        torn: leave out a last line that does not end: whoever wrote it was stopped.

    Raises:
        FileNotFoundError: as `check_file`.
        ValueError: as `check_file`, or a line is not JSON; names it.
    """
    check_file(path, what)
    with path.open("rb") as lines:  # a last line may have been cut inside of a letter
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            if line.strip() and not (torn and not line.endswith(b"\n")):
                yield place, parsed(line, place)


def check_place(path: Path, what: str, *, folder: bool = False) -> None:
    """Raise ValueError if no file (``folder``: no folder) can come to be at ``path``, before work on what goes there.

    Args:
        path: where it is to be; nothing is made.
        what: what names it, for messages.
        folder: whether a folder is to be there, which may exist.
    """
    if path.exists() and path.is_dir() != folder:
        found, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
        raise ValueError(f"{what}={str(path)!r} is {found}, and must be {wanted}")
    there = next(place for place in (path if folder else path.parent, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{what}={str(path)!r}: {str(there)!r} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{what}={str(path)!r}: nothing may be written into {str(there)!r}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft to write to, in a folder that is made for it; at the end it takes the place of ``path``.

    Where writing fails, ``path`` is as before and nothing is left of the draft.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; it appears whole or not at all."""
    with whole(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process works in ``folder`` inside, which is made for it. A process that is killed keeps nobody out.

    Raises:
        ValueError: another one does.
    """
    from filelock import FileLock, Timeout  # asyncio comes with it

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is at work in {folder}: wait until it has ended, or choose another folder"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held; who holds one that is gone, filelock tells
            (folder / LOCK).unlink()
        lock.release()
