"""``moa spans profile``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer

from moa.cli.options import AddressOption, EngineOption, WorkersOption
from moa.cli.spans.command import Overwrite, Recipe, bar, begin, load_model, next_step, replaced, tell


def profile(
    context: typer.Context,
    recipe: Recipe,
    overwrite: Overwrite = False,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    address: AddressOption = None,
) -> None:
    """Step 2: measure what the answers lose, to first order, with every block of attention.

    Needs one forward and backward per item and memory for a few N x N matrices of a single head. A run that was stopped
    goes on after its last finished item. Several workers measure items side by side, each with a copy of the model.
    """
    settings = begin(recipe, context.args)
    where = None if workers is None and engine == "local" else _engine(engine, workers, address)
    from moa.files import alone
    from moa.spans.evidence.calibration import load_items
    from moa.spans.evidence.influence import influence
    from moa.spans.journal import settings_of
    from moa.spans.model import ModelShape

    items = {length: load_items(settings.items_file, length) for length in sorted(settings.lengths)}
    model, _ = load_model(settings)
    windows = ModelShape.of(model).windows
    about = {
        "base": settings.base,
        "data": settings_of(settings.items_file).get("source"),
        "layers": [layer for layer, window in enumerate(windows) if window is None],
    }
    files = [settings.influence_file(length) for length in items]
    parts = settings.profiled / "items"
    with alone(settings.profiled), replaced(files, overwrite), bar("measuring influence") as progress:
        if overwrite:
            shutil.rmtree(parts, ignore_errors=True)
        total = sum(map(len, items.values()))
        before = 0
        for length, own in items.items():
            path = settings.influence_file(length)
            start = before

            def notify(done: int, start: int = start) -> None:
                progress(start + done, total)

            elsewhere = where and partial(_on, where, settings, own, length, parts, notify)
            found = influence(
                model, own, length, settings.block, about=about, save_to=path, elsewhere=elsewhere, progress=notify
            )
            before += len(own)
            tell(f"length {length}: {found.items} items, response loss {found.loss:.4f} ({path})")
        shutil.rmtree(parts, ignore_errors=True)
    settings.save(settings.influence_file(0).parent)
    next_step("search", recipe, context.args)


def _engine(kind: str, workers: int | None, address: str | None) -> Any:
    from moa.studies.engine import Engine

    return Engine(kind, workers, address)


def _on(
    where: Any, settings: Any, items: Any, length: int, folder: Path, told: Callable[[int], None], left: range
) -> Mapping[int, Path]:
    from moa.studies.divided import measure_on

    rest = {place: items[place] for place in left}
    return measure_on(
        where,
        settings.base,
        settings.dtype,
        rest,
        length,
        settings.block,
        folder=folder,
        told=lambda done: told(left.start + done),
    )
