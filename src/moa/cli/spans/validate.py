"""``moa spans validate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from moa.cli.spans.command import Overwrite, Recipe, bar, begin, load_model, next_step, replaced, tell

if TYPE_CHECKING:
    from moa.cli.spans.recipe import PlanFolder, SpanRecipe
    from moa.spans.evidence.validation import Verdict
    from moa.spans.plan import SpanPlan


def validate(context: typer.Context, recipe: Recipe, overwrite: Overwrite = False) -> None:
    """Step 4: apply every plan to texts longer than those of the search, keep the best, write a report.

    A run that was stopped goes on after its last measured loss.
    """
    settings = begin(recipe, context.args)
    from moa.report.spans import write_report
    from moa.spans.evidence.calibration import load_items
    from moa.spans.evidence.validation import validate as compare

    length = settings.validate_length
    fronts = {density: _front(settings.plans(density)) for density in settings.density}
    items = load_items(settings.held_out_file, length)
    model, _ = load_model(settings)
    for density, plans in fronts.items():
        folder = settings.plans(density)
        with replaced([folder.validation_file], overwrite), bar(f"validating {density:g}") as progress:
            found = compare(model, plans, items, length, save_to=folder.validation_file, progress=progress)
        found.plan.save(folder.plan_file)
        _tell(found, plans, length)
        write_report(folder.report_file, found.plan, plans, length)
        settings.save(folder.path)
        tell(f"plan: {folder.plan_file}")
        tell(f"report: {folder.report_file}")
    next_step("run", recipe, [*context.args, *_one_density(settings), "--prompt", "..."])


def _front(folder: PlanFolder) -> list[SpanPlan]:
    from moa.spans.plan import SpanPlan

    if not folder.front():
        raise FileNotFoundError(f"there are no plans in {folder.path}; `moa spans search` writes them")
    return [SpanPlan.load(file) for file in folder.front()]


def _one_density(settings: SpanRecipe) -> list[str]:
    """What `run` must be told where there are several."""
    return [] if len(settings.density) == 1 else ["--density", f"{settings.density[0]:g}"]


def _tell(found: Verdict, plans: list[SpanPlan], length: int) -> None:
    table = Table("plan", f"loss at {length}", f"KV at {length}", box=None)
    table.add_row("dense", f"{found.dense:.4f}", "100.0%")
    same = found.plan.searched["validation"]["uniform_kv_density"]
    table.add_row("one span for all heads", f"{found.uniform:.4f}", f"{same:.1%}")
    for place, (plan, loss) in enumerate(zip(plans, found.losses, strict=True)):
        name = f"{place:02}" + (" (chosen)" if place == found.chosen else "")
        table.add_row(name, f"{loss:.4f}", f"{plan.kv_density(length):.1%}")
    Console().print(table)
