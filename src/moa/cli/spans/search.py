"""``moa spans search``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from moa.cli.spans.command import Overwrite, Recipe, bar, begin, next_step, replaced, tell
from moa.cli.terminal import terminal

if TYPE_CHECKING:
    from moa.cli.spans.recipe import PlanFolder, SpanRecipe
    from moa.spans.evidence.influence import Influence
    from moa.spans.search.plans import Candidate


def search(context: typer.Context, recipe: Recipe, overwrite: Overwrite = False) -> None:
    """Step 3: find the plans that keep the density and lose least, at one length or another.

    Simpler plans of the same bytes, two classes of heads and one span for all, stand beside them for `validate`. One
    profile serves any number of densities, for example `--density 0.25 0.35 0.5`; each gets a folder of its own.
    Solves integer programs with HiGHS, on the processor alone. A run that was stopped goes on after its last solved
    program.
    """
    settings = begin(recipe, context.args)
    from moa.files import alone
    from moa.spans.search.plans import rivals
    from moa.spans.search.plans import search as find

    measured = _measured(settings)
    influences = {length: found.mean() for length, found in measured.items()}
    about = next(iter(measured.values())).about
    said: dict[str, Any] = {
        "layers": about["layers"],
        "model": settings.base,
        "embeddings": about["embeddings"],
        "evidence": _evidence(settings, measured),
    }
    for density in settings.density:
        folder, limits = settings.plans(density), settings.limits(density)
        with alone(folder.path):
            with replaced([folder.search_file], overwrite), bar(f"solving for {density:g}") as progress:
                front = find(influences, limits, **said, save_to=folder.search_file, progress=progress)
            front += rivals(influences, limits, **said)
            _write(folder, front)
            settings.save(folder.path)
        _tell(front, list(measured), folder)
    next_step("validate", recipe, context.args)


def _measured(settings: SpanRecipe) -> dict[int, Influence]:
    """Influence by length.

    Raises:
        FileNotFoundError: no profile.
        ValueError: one of other blocks, of another model, or of a part of the items.
    """
    from moa.spans.evidence.calibration import load_items
    from moa.spans.evidence.influence import Influence

    measured = {length: Influence.load(settings.influence_file(length)) for length in sorted(settings.lengths)}
    for length, found in measured.items():
        file = settings.influence_file(length)
        if (found.length, found.block) != (length, settings.block):
            raise ValueError(f"{file} has blocks of {found.block}, not {settings.block}")
        if found.about.get("base") != settings.base:
            raise ValueError(f"{file} is the influence of {found.about.get('base')!r}, not of base={settings.base!r}")
        asked = len(load_items(settings.items_file, length)) if settings.items_file.exists() else found.items
        if found.items < asked:
            raise ValueError(
                f"{file} holds {found.items} of the {asked} items of {length} tokens: `moa spans profile` was stopped; "
                "give it again to go on"
            )
    return measured


def _evidence(settings: SpanRecipe, measured: dict[int, Influence]) -> dict[str, Any]:
    return {
        "items": {str(length): found.items for length, found in measured.items()},
        "dense_loss": {str(length): found.loss for length, found in measured.items()},
        "seed": settings.seed,
        "data": {str(length): found.about["data"] for length, found in measured.items()},
    }


def _write(folder: PlanFolder, front: list[Candidate]) -> None:
    """The front in place of an earlier one; what was chosen from another front goes with that."""
    from moa.spans.plan import SpanPlan

    plans = [candidate.plan for candidate in front]
    if [SpanPlan.load(file) for file in folder.front()] == plans:
        return
    for path in [*folder.front(), folder.validation_file, folder.plan_file, folder.report_file]:
        path.unlink(missing_ok=True)
    for place, plan in enumerate(plans):
        plan.save(folder.plan(place))


def _tell(front: list[Candidate], lengths: list[int], folder: PlanFolder) -> None:
    table = Table(
        "plan", "kind", *(f"loss at {n}" for n in lengths), *(f"KV at {n}" for n in front[0].densities), box=None
    )
    for place, candidate in enumerate(front):
        losses = [f"{loss:.4g}" for loss in candidate.losses.values()]
        densities = [f"{density:.1%}" for density in candidate.densities.values()]
        table.add_row(f"{place:02}", candidate.kind, *losses, *densities)
    terminal().print(table)
    tell(f"{len(front)} plans in {folder.path}")
