"""Where rows come from: the bundled tasks, a local file or folder, or a data set on the Hugging Face hub."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moa.choices import check_range, first_line, nearest
from moa.data.dialects import Row, convert, unread
from moa.extras import extra
from moa.files import read_json, read_lines
from moa.places import on_hub

ROWS_PER_TASK = 1000
"""How many rows a bundled task gives when no limit is set; its supply is generated, not a file with an end."""

_SUFFIXES = (".json", ".jsonl")


def load_rows(source: str, *, split: str, limit: int | None = None, seed: int = 0) -> list[Row]:
    """Rows of one source in the common form of `moa.data.dialects`.

    Args:
        source: ``tasks:NAME[,NAME...]`` or ``tasks:all`` for the bundled suite (``task`` then names each row's task);
            a ``.json`` or ``.jsonl`` file; a folder with ``train.jsonl``, ``test.jsonl``, ``train_*.jsonl`` and so on;
            or a data set on the hub, ``owner/name`` or ``owner/name:configuration``.
        split: ``train`` or ``test``; a single file is taken as it is.
        limit: at most so many rows, drawn at random with ``seed``; None: all.
        seed: of the draw, and of the bundled tasks.

    Raises:
        ValueError: a row that cannot be used (with file and line), a data set without rows, a folder with one file in
            both formats, an unknown task.
        FileNotFoundError: no such file or folder; names near ones.
    """
    if limit is not None:
        check_range("limit", limit, low=1, whole=True)
    if source.startswith("tasks:"):
        return _bundled(source.removeprefix("tasks:"), split, limit, seed)
    rows = _local(Path(source).expanduser(), split) if _is_local(source) else _from_hub(source, split)
    if not rows:
        raise ValueError(f"{source}: the data set is empty")
    return random.Random(seed).sample(rows, limit) if limit is not None and limit < len(rows) else rows


def bundled_tasks(names: str) -> list[str]:
    """The tasks that stand behind ``tasks:``, all of the suite for ``all``.

    Raises:
        ValueError: an unknown task, or one that is named twice.
    """
    from moa.tasks import SUITE, TASKS

    if names == "all":
        return list(SUITE)
    tasks = [name.strip() for name in names.split(",")]
    for task in tasks:
        if task not in TASKS:
            raise ValueError(
                f"there is no bundled task {task!r}{nearest(task, TASKS)}; tasks are {sorted(TASKS)}, or all alone"
            )
        if tasks.count(task) > 1:
            raise ValueError(f"'tasks:{names}' names {task!r} twice")
    return tasks


def _bundled(names: str, split: str, limit: int | None, seed: int) -> list[Row]:
    tasks = bundled_tasks(names)
    each = ROWS_PER_TASK if limit is None else -(-limit // len(tasks))
    rows: list[Row] = [row | {"task": task} for task in tasks for row in _of_task(task, split, each, seed)]
    random.Random(seed).shuffle(rows)
    return rows[:limit]


def _of_task(task: str, split: str, number: int, seed: int) -> list[dict[str, str]]:
    """So many rows, or all that the task has."""
    from moa.tasks import TASKS

    rows = TASKS[task].draw(split, number, seed)
    if len(rows) < number:
        print(f"note: task {task!r} has {len(rows)} distinct {split} rows, fewer than {number}: all are taken")
    return rows


def _is_local(source: str) -> bool:
    """Everything but ``owner/name``, which is local too if there is such a path."""
    return Path(source).suffix in _SUFFIXES or not on_hub(source)


def _local(path: Path, split: str) -> list[Row]:
    if path.is_dir():
        return [row for file in _split_files(path, split) for row in _from_file(file, split)]
    if not path.exists():
        parent = path.parent
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        where = "" if siblings else f"; there is no folder {str(parent)!r} either"
        raise FileNotFoundError(f"there is no data set {str(path)!r}{nearest(path.name, siblings)}{where}")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: cannot read {path.suffix or 'files without a suffix'}, only {', '.join(_SUFFIXES)}")
    return _from_file(path, split)


def _split_files(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    chosen = [file for file in files if file.stem == split or file.stem.startswith((f"{split}_", f"{split}-"))]
    if not chosen:
        names = ", ".join(file.name for file in files) or "no .json or .jsonl file at all"
        raise FileNotFoundError(f"{folder} has no {split}.jsonl, {split}.json or {split}_*.jsonl; it has {names}")
    stems = [file.stem for file in chosen]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise ValueError(f"{folder} has both {twice}.json and {twice}.jsonl: name the file that is meant, or move one")
    return chosen


def _from_file(file: Path, split: str) -> list[Row]:
    found = read_lines(file, "data set") if file.suffix == ".jsonl" else _items(file)
    return _converted(found, split, str(file))


def _converted(found: Iterable[tuple[str, Any]], split: str, source: str) -> list[Row]:
    """Rows by place; says once which of their fields nothing reads, for a question may stand in one of them."""
    rows: list[Row] = []
    unused: set[str] = set()
    for place, fields in found:
        rows.append(convert(fields, split=split, place=place))
        unused |= unread(fields)
    if unused:
        print(f"note: {source}: the fields {sorted(unused)} are not read")
    return rows


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = read_json(file, "data set")
    except ValueError as error:
        hint = "; one object a line is what .jsonl files hold" if "Extra data" in str(error) else ""
        raise ValueError(f"{error}{hint}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file}: a .json data set must be a list of objects, not {type(rows).__name__}")
    for number, fields in enumerate(rows, start=1):
        yield f"{file}, row {number}", fields


def _from_hub(source: str, split: str) -> list[Row]:
    with extra("train"):
        from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        loaded = load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} is no local path and could not be loaded from the hub: {first_line(error)}"
        ) from error
    numbered = enumerate(map(_without_nulls, loaded), start=1)
    return _converted(((f"{source}, {split} row {number}", fields) for number, fields in numbered), split, source)


def _without_nulls(value: Any) -> Any:
    """Nested dicts without null: a table has every column in every row, and null where a row has none."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
