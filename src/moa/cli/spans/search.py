"""``moa spans search``."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from moa.cli.spans.command import Overwrite, Recipe, bar, begin, next_step, tell


def search(context: typer.Context, recipe: Recipe, overwrite: Overwrite = False) -> None:
    """Step 3: find the plans that keep the density and lose least, at one length or another.

    Solves integer programs with HiGHS, on the processor alone; a plan's gap says how much better any other could be.
    A run that was stopped goes on after its last solved program.
    """
    settings = begin(recipe, context.args, remove=lambda r: [r.plans] + ([r.search_file] if overwrite else []))
    from moa.models import config_of
    from moa.spans.evidence.influence import Influence
    from moa.spans.search.plans import search as find
    from moa.spans.shape import ModelShape

    measured = {length: Influence.load(settings.influence_file(length)) for length in sorted(settings.lengths)}
    for length, found in measured.items():
        if (found.length, found.block) != (length, settings.block):
            raise ValueError(f"{settings.influence_file(length)} has blocks of {found.block}, not {settings.block}")
    windows = ModelShape.of(config_of(settings.base)).windows
    with bar("solving") as progress:
        front = find(
            {length: found.mean(settings.influence) for length, found in measured.items()},
            settings.limits(),
            layers=[layer for layer, window in enumerate(windows) if window is None],
            model=settings.base,
            evidence={
                "influence": settings.influence,
                "items": {str(length): found.items for length, found in measured.items()},
                "dense_loss": {str(length): found.loss for length, found in measured.items()},
                "seed": settings.seed,
                "data": settings.data.source,
            },
            save_to=settings.search_file,
            progress=progress,
        )
    settings.plans.mkdir(parents=True, exist_ok=True)
    table = Table(
        "plan", *(f"loss at {n}" for n in measured), *(f"KV at {n}" for n in front[0].densities), "gap", box=None
    )
    for place, candidate in enumerate(front):
        candidate.plan.save(settings.plans / f"plan-{place:02}.json")
        losses = [f"{loss:.4g}" for loss in candidate.losses.values()]
        densities = [f"{density:.1%}" for density in candidate.densities.values()]
        table.add_row(f"{place:02}", *losses, *densities, f"{candidate.gap:.2%}")
    Console().print(table)
    tell(f"{len(front)} plans in {settings.plans}")
    next_step("validate", recipe, context.args)
