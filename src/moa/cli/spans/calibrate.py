"""``moa spans calibrate``."""

from __future__ import annotations

import typer

from moa.cli.spans.command import Overwrite, Recipe, bar, begin, load_model, next_step, replaced, tell


def calibrate(context: typer.Context, recipe: Recipe, overwrite: Overwrite = False) -> None:
    """Step 1: let the dense model answer long prompts; the search protects these answers.

    Texts of every profiled length, and others of the longer one that `validate` uses. A run that was stopped goes on
    where it was. Any key of the recipe is a flag, too.
    """
    settings = begin(recipe, context.args)
    model, tokenizer = load_model(settings)
    from moa.spans.evidence.calibration import calibrate as answer

    lengths = dict.fromkeys(sorted(settings.lengths), False)
    wanted = {"calibration": (lengths, settings.items, settings.items_file)}
    held_out = {settings.validate_length: True}
    wanted["validation"] = (held_out, settings.validate_items, settings.held_out_file)
    for name, (which, items, path) in wanted.items():
        with replaced([path], overwrite), bar(f"answering for {name}") as progress:
            counts = answer(
                model,
                tokenizer,
                settings.source(),
                which,
                path,
                items=items,
                max_new_tokens=settings.max_new_tokens,
                progress=progress,
            )
        said = ", ".join(f"{count} of {length} tokens" for length, count in counts.items())
        tell(f"{name} items: {said} ({path})")
        if few := [length for length, count in counts.items() if count < items]:
            tell(f"the source has fewer than {items} texts for lengths {few}")
    settings.save(settings.profiled)
    next_step("profile", recipe, context.args)
