"""``moa spans validate``."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from moa.cli.spans.command import Overwrite, Recipe, bar, begin, load_model, next_step, tell


def validate(context: typer.Context, recipe: Recipe, overwrite: Overwrite = False) -> None:
    """Step 4: apply every plan to texts longer than those of the search, keep the best, write a report.

    A run that was stopped goes on after its last measured loss.
    """
    settings = begin(recipe, context.args, remove=lambda r: [r.validation_file] if overwrite else [])
    from moa.report.spans import write_report
    from moa.spans.evidence.calibration import load_items
    from moa.spans.evidence.validation import validate as compare
    from moa.spans.plan import SpanPlan

    files = sorted(settings.plans.glob("plan-*.json"))
    if not files:
        raise FileNotFoundError(f"there are no plans in {settings.plans}; `moa spans search` writes them")
    plans = [SpanPlan.load(file) for file in files]
    length = settings.validate_length
    items = load_items(settings.held_out_file, length)
    model, _ = load_model(settings)
    with bar("validating") as progress:
        found = compare(model, plans, items, length, save_to=settings.validation_file, progress=progress)
    found.plan.save(settings.plan_file)
    table = Table("plan", f"loss at {length}", f"KV at {length}", box=None)
    table.add_row("dense", f"{found.dense:.4f}", "100.0%")
    same = found.plan.searched["validation"]["uniform_kv_density"]
    table.add_row("one span for all heads", f"{found.uniform:.4f}", f"{same:.1%}")
    for place, (plan, loss) in enumerate(zip(plans, found.losses, strict=True)):
        name = f"{place:02}" + (" (chosen)" if place == found.chosen else "")
        table.add_row(name, f"{loss:.4f}", f"{plan.kv_density(length):.1%}")
    Console().print(table)
    write_report(settings.report_file, found.plan, plans, length)
    tell(f"plan: {settings.plan_file}")
    tell(f"report: {settings.report_file}")
    next_step("run", recipe, [*context.args, "--prompt", "..."])
