"""``moa spans validate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.table import Table

from moa.cli.spans.command import Overwrite, Recipe, bar, begin, items_of, load_model, next_step, replaced, tell
from moa.cli.terminal import terminal

if TYPE_CHECKING:
    from moa.cli.spans.recipe import PlanFolder, SpanRecipe
    from moa.spans.evidence.validation import Verdict
    from moa.spans.plan import SpanPlan


def validate(context: typer.Context, recipe: Recipe, overwrite: Overwrite = False) -> None:
    """Step 4: apply every plan to texts longer than those of the search, keep the best, write a report.

    The least loss wins, whatever kind of plan has it; the share of answers that stay the same is shown beside it.

    A run that was stopped goes on after its last measured loss.
    """
    settings = begin(recipe, context.args)
    from moa.files import alone
    from moa.report.spans import write_report
    from moa.spans.evidence.validation import validate as compare

    length = settings.validate_length
    fronts = {density: _front(settings.plans(density)) for density in settings.density}
    items = items_of(settings.held_out_file, length, settings.validate_items)
    model, _ = load_model(settings)
    for density, plans in fronts.items():
        folder = settings.plans(density)
        with alone(folder.path):
            with replaced([folder.validation_file], overwrite), bar(f"validating {density:g}") as progress:
                found = compare(model, plans, items, length, save_to=folder.validation_file, progress=progress)
            found.plan.save(folder.plan_file)
            write_report(folder.report_file, found.plan, plans, length)
            settings.save(folder.path)
        _tell(found, plans, length)
        tell(f"plan: {folder.plan_file}")
        tell(f"report: {folder.report_file}")
    next_step("run", recipe, [*_of_one_density(settings, context.args), "--prompt", "..."])


def _front(folder: PlanFolder) -> list[SpanPlan]:
    from moa.spans.plan import SpanPlan

    if not folder.front():
        raise FileNotFoundError(f"there are no plans in {folder.path}; `moa spans search` writes them")
    return [SpanPlan.load(file) for file in folder.front()]


def _of_one_density(settings: SpanRecipe, arguments: list[str]) -> list[str]:
    """The flags for `run`, which answers under one plan."""
    from moa.cli.keys import grouped

    if len(settings.density) == 1:
        return arguments
    others = [part for flag, values in grouped(arguments) if flag != "--density" for part in (flag, *values)]
    return [*others, "--density", f"{settings.density[0]:g}"]


def _tell(found: Verdict, plans: list[SpanPlan], length: int) -> None:
    table = Table("plan", "kind", f"loss at {length}", "answers kept", f"KV at {length}", box=None)
    rows = [("", "dense", found.dense)]
    for place, (plan, measured) in enumerate(zip(plans, found.measured, strict=True)):
        name = f"{place:02}" + (" (chosen)" if place == found.chosen else "")
        rows.append((name, str(plan.searched.get("kind", "")), measured))
    for name, kind, one in rows:
        table.add_row(name, kind, f"{one.loss:.4f}", f"{one.accuracy:.1%}", f"{one.kv_density:.1%}")
    terminal().print(table)
