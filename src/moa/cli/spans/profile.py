"""``moa spans profile``."""

from __future__ import annotations

import typer

from moa.cli.spans.command import Overwrite, Recipe, bar, begin, load_model, next_step, replaced, tell


def profile(context: typer.Context, recipe: Recipe, overwrite: Overwrite = False) -> None:
    """Step 2: measure what the answers lose, to first order, with every block of attention.

    Needs one forward and backward per item and memory for a few N x N matrices of a single head. A run that was stopped
    goes on after its last finished item.
    """
    settings = begin(recipe, context.args)
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
    with alone(settings.profiled), replaced(files, overwrite), bar("measuring influence") as progress:
        total = sum(map(len, items.values()))
        before = 0
        for length, own in items.items():
            path = settings.influence_file(length)
            start = before

            def notify(done: int, start: int = start) -> None:
                progress(start + done, total)

            found = influence(model, own, length, settings.block, about=about, save_to=path, progress=notify)
            before += len(own)
            tell(f"length {length}: {found.items} items, response loss {found.loss:.4f} ({path})")
    settings.save(settings.influence_file(0).parent)
    next_step("search", recipe, context.args)
