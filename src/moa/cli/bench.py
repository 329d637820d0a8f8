"""``moa bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Column, Table
from rich.text import Text

from moa.cli.keys import flags
from moa.cli.options import AddressOption, EngineOption, WorkersOption
from moa.cli.tables import progress_bar
from moa.cli.terminal import terminal


def bench(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="A study file, see docs/howto/bench.md.", metavar="STUDY.yaml")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show cells, parameters and an estimate of the time; train nothing else.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Run this method alone; may be repeated.", metavar="METHOD")
    ] = None,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    address: AddressOption = None,
    any_version: Annotated[
        bool,
        typer.Option("--any-version", help="Go on from cells that were made with other versions of torch and so on."),
    ] = False,
) -> None:
    """Compare fine-tuning methods at equal trained parameters, and state a verdict with intervals.

    Any single key of the study is a flag, too: `moa bench mine.yaml --steps 50 --output runs/quick`.

    Every training run is a cell with a file of its own. A study that was stopped or killed goes on when the command is
    given again; cells whose configuration was changed are run again. The output folder then holds `index.html` (the
    verdict), `results.json`, `results.md` and `cells/`.
    """
    from moa.studies.study import Study

    resolved = Study.load(study, flags(context.args))
    from moa.files import alone, check_place
    from moa.settings import save
    from moa.studies.conduct import conduct
    from moa.studies.engine import Engine
    from moa.studies.plan import plan
    from moa.training.stops import TrainingStopped

    console = terminal()
    check_place(Path(resolved.output).expanduser(), "output", folder=True)
    where = Engine(engine, workers, address)
    with console.status("sizing methods") as status:
        planned = plan(resolved, only or [], lambda name: status.update(Text(f"sizing {name}")))
    if dry_run:
        _show_plan(console, planned, workers or 1)
        return
    failures = []
    with alone(planned.folder):
        save(resolved, planned.folder / "study.yaml")
        try:
            with progress_bar(console, TextColumn("{task.fields[left]}")) as bar:
                line = bar.add_task("", total=None, left="")
                failures = conduct(
                    planned, engine=where, any_version=any_version, progress=lambda state: _advance(bar, line, state)
                )
        finally:
            _show_results(console, planned)
    if failures:
        shown = "\n  ".join(f"{failure.message} ({failure.log})" for failure in failures[:5])
        raise TrainingStopped(f"{len(failures)} cells failed; give the command again to retry them:\n  {shown}")


def _advance(bar: Any, line: Any, state: Any) -> None:
    from moa.report.page import duration

    left = "" if state.seconds_left is None else f"about {duration(state.seconds_left)} left"
    bar.update(line, description=state.phase, completed=state.done, total=state.total, left=left)
    if state.last is not None and not bar.console.is_terminal:
        bar.console.print(f"{state.last.name}: {state.done} of {state.total} {left}")


def _show_plan(console: Console, planned: Any, workers: int) -> None:
    from moa.report.page import duration
    from moa.studies import cells as grid
    from moa.studies.conduct import seconds_for, trial_seconds

    study = planned.study
    title = f"{study.title}: trained parameters and sizes"
    numbers = [Column(name, justify="right") for name in ("budget", "trained", "off")]
    table = Table("method", *numbers, "sizes", title=title, title_justify="left", box=None)
    for (name, budget), fitted in planned.fits.items():
        off = f"{fitted.trained / budget - 1:+.2%}" if fitted.trained else ""
        table.add_row(name, f"{budget:,}", f"{fitted.trained:,}", off, _sizes(fitted.sizes))
    console.print(table)
    rates = planned.rates(planned.methods)
    tries = grid.tries(study, planned.methods)
    tests = grid.tests(study, planned.methods, rates or planned.first_rates)
    done = planned.finished([*tries, *(tests if rates else [])])
    for purpose, cells in (("to choose learning rates", tries), ("to compare", tests)):
        console.print(f"{len(cells)} cells {purpose}, {sum(cell in done for cell in cells)} of them done")
    left = [cell for cell in (*tries, *tests) if cell not in done]
    if not left:
        return
    with console.status(Text(f"timing a few steps of {planned.methods[0]}")):
        one_try, one_test = trial_seconds(planned, planned.methods[0])
    total = sum(one_try if cell.purpose == grid.TRY else one_test for cell in left)
    console.print(
        f"about {duration(one_try)} a try and {duration(one_test)} a comparison cell, from a few steps of "
        f"{planned.methods[0]}; about {duration(total / workers)} in all with {workers} worker{'s' * (workers > 1)}"
    )
    if known := seconds_for(left, done, workers):
        console.print(f"about {duration(known)} in all, from the cells that are done")


def _sizes(sizes: dict[str, float]) -> str:
    """Mean sizes of parts, those of one setting as a range: ``lora r 7 to 8, parallel size 16``."""
    groups: dict[str, list[float]] = {}
    for part, size in sizes.items():
        groups.setdefault(part.partition(" on ")[0], []).append(size)
    ranges = {name: (f"{min(values):.4g}", f"{max(values):.4g}") for name, values in groups.items()}
    return ", ".join(f"{name} {low}" + (f" to {high}" if high != low else "") for name, (low, high) in ranges.items())


def _show_results(console: Console, planned: Any) -> None:
    from moa.studies.report import table as table_of
    from moa.studies.report import write_report, write_results
    from moa.studies.results import gather

    results = gather(planned)
    write_results(results, planned.folder)
    page = write_report(results, planned.folder / "index.html")
    columns, lines = table_of(results["rows"])
    shown = [place for place, name in enumerate(columns) if name not in ("parameters", "MiB")]
    table = Table(*(Column(columns[place], justify="right" if place else "left") for place in shown), box=None)
    for line in lines:
        table.add_row(*(line[place].partition(" (")[0] if place else line[place] for place in shown))
    console.print(table)
    for claim in results["claims"]:
        console.print(Text.assemble((claim["text"], "bold"), f"\n  {claim['verdict']}"))
    if results["missing_cells"]:
        console.print(f"{results['missing_cells']} cells are still missing: give the command again to go on")
    console.print(f"intervals and everything else: {page}", soft_wrap=True)
