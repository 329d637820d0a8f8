"""``moa spans calibrate``."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from moa.cli.spans.command import Overwrite, Recipe, bar, begin, load_model, next_step, replaced, tell
from moa.cli.terminal import terminal

if TYPE_CHECKING:
    from moa.spans.evidence.calibration import Signal


def calibrate(context: typer.Context, recipe: Recipe, overwrite: Overwrite = False) -> None:
    """Step 1: let the dense model answer long prompts; the search protects these answers.

    Texts of every profiled length, and others of the longer one that `validate` uses. Says of every item whether its
    answer is right and whether it needs the far context, and refuses a set that does not. A run that was stopped goes
    on where it was. Any key of the recipe is a flag, too.
    """
    settings = begin(recipe, context.args)
    model, tokenizer = load_model(settings)
    from moa.files import alone
    from moa.spans.evidence.calibration import calibrate as answer
    from moa.spans.evidence.calibration import check_signals

    lengths = dict.fromkeys(sorted(settings.lengths), False)
    wanted = {"calibration": (lengths, settings.items, settings.items_file)}
    held_out = {settings.validate_length: True}
    wanted["validation"] = (held_out, settings.validate_items, settings.held_out_file)
    for name, (which, items, path) in wanted.items():
        with alone(path.parent), replaced([path], overwrite), bar(f"answering for {name}") as progress:
            signals = answer(
                model,
                tokenizer,
                settings.source(),
                which,
                path,
                items=items,
                max_new_tokens=settings.max_new_tokens,
                progress=progress,
            )
        said = ", ".join(f"{len(own)} of {length} tokens" for length, own in signals.items())
        tell(f"{name} items: {said} ({path})")
        _tell(signals)
        if few := [length for length, own in signals.items() if len(own) < items]:
            tell(f"the source has fewer than {items} texts for lengths {few}")
        check_signals(signals, settings.signal)
    settings.save(settings.profiled)
    next_step("profile", recipe, context.args)


def _tell(signals: dict[int, list[Signal]]) -> None:
    """Every item, and a line for all of a length."""
    table = Table("tokens", "item", "right answers", "loss", "under a short window", "needs far context", box=None)
    for length, own in signals.items():
        for place, one in enumerate(own):
            right = "unknown" if one.right is None else f"{one.right} of {one.asked}"
            table.add_row(
                f"{length}", f"{place}", right, f"{one.loss:.3f}", f"{one.far:+.3f}", "yes" if one.carries else "no"
            )
        known = [one for one in own if one.right is not None]
        share = f"{sum(one.right or 0 for one in known)} of {sum(one.asked for one in known)}" if known else "unknown"
        carrying = f"{sum(one.carries for one in own)} of {len(own)}"
        losses = f"{fmean(one.loss for one in own):.3f}", f"{fmean(one.far for one in own):+.3f}"
        table.add_row(f"{length}", "all", share, *losses, carrying)
    terminal().print(table)
