"""`moa demo`: a small language model learns the bundled tasks before your eyes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from moa.cli.heatmap import heatmap
from moa.cli.tables import progress_bar

if TYPE_CHECKING:
    from moa.evaluation.results import Outcome
    from moa.evaluation.sets import EvaluationSet
    from moa.training.recipe import Recipe


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the adapter; an earlier demo in it is replaced.")] = Path(
        "moa-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, training data and test questions.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Test questions of each task.")] = 100,
) -> None:
    """Fine-tune the embedded base model with Soft MoA and show what it learned; about four minutes on two cores.

    Measures the untuned base on every bundled task, trains, measures again on the same questions (none of which is in
    the training data), reloads the saved adapter in a fresh process and shows which experts the routers use.
    """
    from moa.demo import recipe_of

    show(recipe_of(output, seed), rows, Console())


def show(recipe: Recipe, rows: int, console: Console) -> None:
    """The whole demonstration, for any recipe on the bundled tasks.

    Raises:
        ValueError: the output folder holds something else than an earlier run.
    """
    from transformers.utils.logging import disable_progress_bar

    from moa import demo as parts
    from moa.training.output import check_output
    from moa.training.sft import train

    check_output(recipe, resume=False, overwrite=True)
    disable_progress_bar()  # of loading weights, which takes a moment here
    started = time.monotonic()
    sets = parts.test_sets(rows, recipe.seed)
    console.print(Rule("1/4  before: the base model as it is", align="left"))
    before = _measure(recipe, sets, None, console)
    console.print(Rule("2/4  fine-tuning with Soft MoA", align="left"))
    adapter = train(recipe, overwrite=True)
    console.print(Rule("3/4  after: the same questions, with the adapter", align="left"))
    after = _measure(recipe, sets, adapter, console)
    parts.keep(recipe, adapter, before=before, after=after)
    console.print(comparison(before, after))
    _routing(adapter, sets, console)
    console.print(Rule("4/4  a fresh process loads the saved adapter and answers", align="left"))
    _examples(parts.shown_rows(sets), adapter, console)
    _farewell(adapter, time.monotonic() - started, console)


def comparison(before: Sequence[Outcome], after: Sequence[Outcome]) -> Table:
    """Accuracy by task before and after, with the means of families and of all."""
    from moa.evaluation.results import family_means

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for column in ("chance", "before", "after", "95 % interval", "n"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for (data, old), (_, new) in zip(before, after, strict=True):
        low, high = new.interval
        chance, was, now = (f"{share:.0%}" for share in (data.chance or 0, old.accuracy, new.accuracy))
        interval = f"{100 * low:.0f} to {100 * high:.0f}"
        table.add_row(data.name, data.family, chance, was, f"[bold green]{now}[/]", interval, str(len(new.items)))
    table.add_section()
    old_means, new_means = family_means(before), family_means(after)
    for family, share in new_means.items():
        gain = f"{100 * (share - old_means[family]):+.0f} points"
        table.add_row("mean", family, "", f"{old_means[family]:.0%}", f"[bold]{share:.0%}[/]", gain, "")
    return table


def _measure(recipe: Recipe, sets: Sequence[EvaluationSet], adapter: Path | None, console: Console) -> list[Outcome]:
    from moa import demo as parts

    total = sum(len(data.rows) for data in sets)
    console.print(f"{len(sets)} tasks, {total} test questions; greedy answers, exact match")
    with progress_bar(console) as bar:
        line = bar.add_task("", total=total)
        return parts.measure(
            recipe,
            sets,
            adapter=adapter,
            progress=lambda name, done: bar.update(line, description=name, advance=done),
        )


def _routing(adapter: Path, sets: Sequence[EvaluationSet], console: Console) -> None:
    from moa.demo import mean_gates

    gates, experts = mean_gates(adapter, sets)
    console.print("How far the routers open each expert (mean gate over test prompts; bright: open)", highlight=False)
    console.print(heatmap(gates.tolist(), [f"block {number}" for number in range(len(gates))], experts))
    console.print()


def _examples(rows: Sequence[dict[str, str]], adapter: Path, console: Console) -> None:
    from moa.demo import answers_of_fresh_process

    answers = answers_of_fresh_process(adapter, [row["instruction"] for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        console.print(f"[dim]?[/] {escape(row['instruction'])}", highlight=False)
        console.print(f"[bold green]>[/] {escape(answer.strip())}\n", highlight=False)


def _farewell(adapter: Path, seconds: float, console: Console) -> None:
    size = sum(file.stat().st_size for file in adapter.glob("adapter_*")) / 1e6
    lines = [
        f"Done in {seconds / 60:.1f} minutes. In {adapter}: the adapter ({size:.1f} MB), its recipe, all answers.",
        "",
        "Try next:",
        f'  moa generate {adapter} "Ann has 12 pens. Ann gives 5 of them to Ben. How many pens does Ann have left?"',
        f"  moa eval {adapter} --data tasks:sorting,lookup --limit 500",
        "  moa train embedded-sparse-moa",
        "  moa recipes ls",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
