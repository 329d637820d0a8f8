"""``moa spans profile``."""

from __future__ import annotations

import shutil
from functools import partial

import typer

from moa.cli.options import AddressOption, EngineOption, WorkersOption, elsewhere
from moa.cli.spans.command import Overwrite, Recipe, bar, begin, items_of, load_model, next_step, replaced, tell


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
    where = elsewhere(engine, workers, address)
    from moa.files import alone
    from moa.spans.evidence.influence import influence
    from moa.spans.journal import settings_of
    from moa.spans.model import ModelShape

    if where is not None:
        from moa.studies.divided import measure_on
    items = {length: items_of(settings.items_file, length, settings.items) for length in sorted(settings.lengths)}
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

            apart = None
            if where is not None:
                given = (where, settings.base, settings.dtype, own, length, settings.block)
                apart = partial(measure_on, *given, folder=parts, told=notify)
            found = influence(
                model, own, length, settings.block, about=about, save_to=path, elsewhere=apart, progress=notify
            )
            before += len(own)
            tell(f"length {length}: {found.items} items, response loss {found.loss:.4f} ({path})")
        shutil.rmtree(parts, ignore_errors=True)
    settings.save(settings.influence_file(0).parent)
    next_step("search", recipe, context.args)
