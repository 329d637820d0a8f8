"""`moa inspect`: how an adapter uses its experts, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moa.cli.heatmap import heatmap
from moa.cli.options import (
    BaseOption,
    DataOption,
    Dtype,
    DtypeOption,
    NewTokensOption,
    SeedOption,
    TemplateOption,
    check_places,
)
from moa.cli.tables import progress_bar
from moa.cli.terminal import terminal
from moa.files import check_place

if TYPE_CHECKING:
    from moa.evaluation.sets import EvaluationSet
    from moa.inspection import Inspection


def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder or hub name of the adapter.")],
    against: Annotated[
        str | None, typer.Option(help="A second adapter to show beside it, on the same rows.", metavar="ADAPTER")
    ] = None,
    base: BaseOption = None,
    data: DataOption = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many rows of each set, drawn at random.")] = 20,
    examples: Annotated[int, typer.Option(min=0, help="Answers of each set to write and show token by token.")] = 1,
    max_new_tokens: NewTokensOption = None,
    output: Annotated[
        Path, typer.Option(help="The page; the numbers go beside it into a .json file of the same name.")
    ] = Path("report.html"),
    template: TemplateOption = None,
    dtype: DtypeOption = Dtype.auto,
    seed: SeedOption = 0,
) -> None:
    """Look into an adapter: gates, dead experts, who is strongest on which token, how alike the experts are.

    The page is one file without scripts and works offline.

    Examples:
        `moa inspect runs/my-adapter`

        `moa inspect runs/my-adapter --data my-test.jsonl --limit 50 --output routing.html`

        `moa inspect runs/soft-moa --against runs/molora`
    """
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {output} must end in .html; the numbers go beside it into a .json file")
    check_place(output, "--output")
    check_place(output.with_suffix(".json"), "--output, its numbers")
    check_places(adapter)
    check_places(against)
    from moa.evaluation.sets import load_all
    from moa.report.inspection import write_report

    sets = load_all(data or ["tasks:all"], limit=limit, seed=seed, max_new_tokens=max_new_tokens)
    console = terminal()
    found = []
    for name in [adapter, *([against] if against else [])]:
        found.append(_look(name, base, dtype, template, sets, examples, console))
        _show(found[-1], console)
    page, numbers = write_report(output, found)
    console.print(f"page: {page}\nnumbers: {numbers}", soft_wrap=True)


def _look(
    adapter: str,
    base: str | None,
    dtype: str,
    template: str | None,
    sets: list[EvaluationSet],
    examples: int,
    console: Console,
) -> Inspection:
    from moa.evaluation.models import load
    from moa.inspection import inspect_adapter

    loaded = load(adapter, base, dtype=dtype, template=template)
    with progress_bar(console) as bar:
        line = bar.add_task("", total=sum(len(data.rows) + min(examples, len(data.rows)) for data in sets))
        return inspect_adapter(
            loaded,
            sets,
            adapter=adapter,
            examples=examples,
            progress=lambda name, steps: bar.update(line, description=name, advance=steps),
        )


def _show(found: Inspection, console: Console) -> None:
    """The picture of mean gates, where all blocks have the same experts, and the dead ones."""
    console.print(found.adapter, style="bold", soft_wrap=True)
    own = [router for router in found.pooled.routers if router.site is None]
    for note in found.notes:
        console.print(note)
    if own and all(router.columns == found.experts for router in own):
        console.print("Mean gate of each expert (bright: open)")
        names = [f"block {router.block}" for router in own]
        console.print(heatmap([router.mean for router in own], names, found.experts))
    if found.pooled.routers:
        dead = "; ".join(found.dead) or "none"
        console.print(f"Dead experts: {dead}")
