"""`moa demo`: a pretrained language model learns to read booking requests before your eyes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moa.cli.heatmap import heatmap
from moa.cli.tables import progress_bar
from moa.cli.terminal import terminal

if TYPE_CHECKING:
    from moa.evaluation.accuracy import Result
    from moa.evaluation.sets import EvaluationSet
    from moa.training.recipe import Recipe

SHOWN = 3  # requests whose answers are shown side by side


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the adapter; an earlier demo in it is replaced.")] = Path(
        "moa-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, training data and test requests.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Test requests.")] = 64,
) -> None:
    """Fine-tune SmolLM2-135M with Soft MoA to turn booking requests into JSON; minutes on two cores.

    Measures the untuned model, told the task and shown solved requests, on requests none of which is in the training
    data; trains; measures again; reloads the saved adapter in a fresh process, which answers side by side with the
    untuned model; and shows which experts the routers use.
    """
    from moa.demo import recipe_of

    show(recipe_of(output, seed), limit, terminal())


def show(recipe: Recipe, rows: int, console: Console) -> None:
    """The whole demonstration, for any recipe on booking requests whose base model has a chat template.

    Raises:
        ValueError: the output folder holds something else than an earlier run.
    """
    from transformers.utils.logging import disable_progress_bar

    from moa import demo as parts
    from moa.models import find
    from moa.training.output import check_output
    from moa.training.sft import train

    check_output(recipe, resume=False, overwrite=True)
    find(recipe.base)  # which may take a download
    disable_progress_bar()  # of loading weights, which takes a moment here
    started = time.monotonic()
    data = parts.test_set(rows, recipe.seed)
    console.print(Rule(f"1/4  before: {recipe.base} as it is", align="left"))
    console.print(f"It is told the task in full and shown {parts.SOLVED} solved requests.")
    before = _measure(recipe, data, None, console)
    console.print(Rule(f"2/4  fine-tuning with Soft MoA on {recipe.data.limit} requests", align="left"))
    training = time.monotonic()
    adapter = train(recipe, overwrite=True)
    console.print(f"trained in {time.monotonic() - training:.0f} seconds")
    console.print(Rule("3/4  after: the same requests, with the adapter", align="left"))
    console.print("It is told the task in one sentence.")
    after = _measure(recipe, data, adapter, console)
    parts.keep(recipe, data, adapter, before=before, after=after)
    console.print(comparison(before, after))
    _routing(adapter, data, recipe.dtype, console)
    console.print(Rule("4/4  a fresh process loads the saved adapter and answers", align="left"))
    _examples(data, before, adapter, recipe.dtype, console)
    _farewell(adapter, data.rows[0]["instruction"], recipe.dtype, time.monotonic() - started, console)


def comparison(before: Result, after: Result) -> Table:
    """How often each field is right before and after, and how often all of them are."""
    from moa.demo import field_shares

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("right", no_wrap=True)
    for column in ("before", "after", "95 % interval", "n"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for (name, old), new in zip(field_shares(before).items(), field_shares(after).values(), strict=True):
        table.add_row(name, f"{old:.0%}", f"{new:.0%}", "", "")
    table.add_section()
    low, high = after.interval
    interval = f"{100 * low:.0f} to {100 * high:.0f}"
    share = Text(f"{after.accuracy:.0%}", "bold green")
    table.add_row("all of them", f"{before.accuracy:.0%}", share, interval, str(len(after.items)))
    table.caption = f"{100 * (after.accuracy - before.accuracy):+.0f} points"
    return table


def side_by_side(gold: str, before: str | None, after: str | None) -> Table:
    """Every field of the right answer with what both models wrote: right ones green, wrong ones red.

    Args:
        gold: a JSON object.
        before: what the untuned model wrote.
        after: what the tuned one wrote.
    """
    from moa.evaluation.answers import extract, fields_right

    texts = [before or "", after or ""]
    found: list[dict[str, Any]] = [json.loads(extract("json", text) or "{}") for text in texts]
    right = [fields_right(text, gold) for text in texts]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "right answer", "before", "after"):
        table.add_column(column, max_width=26, overflow="ellipsis", no_wrap=True)
    for name, value in json.loads(gold).items():
        written = [json.dumps(answer[name], ensure_ascii=False) if name in answer else "-" for answer in found]
        judged = [Text(text, "green" if fields[name] else "red") for text, fields in zip(written, right, strict=True)]
        table.add_row(Text(name, "dim"), json.dumps(value, ensure_ascii=False), *judged)
    return table


def _measure(recipe: Recipe, data: EvaluationSet, adapter: Path | None, console: Console) -> Result:
    from moa import demo as parts

    console.print(f"{len(data.rows)} requests; greedy answers; right is a field with exactly the right value")
    with progress_bar(console) as bar:
        line = bar.add_task(data.name, total=len(data.rows))
        return parts.measure(recipe, data, adapter=adapter, progress=lambda done: bar.update(line, advance=done))


def _routing(adapter: Path, data: EvaluationSet, dtype: str, console: Console) -> None:
    from moa.demo import mean_gates

    gates, experts = mean_gates(adapter, data, dtype)
    console.print("How far the routers open each expert (mean gate over test prompts; bright: open)")
    console.print(heatmap(gates.tolist(), [f"block {number}" for number in range(len(gates))], experts))
    console.print()


def _examples(data: EvaluationSet, before: Result, adapter: Path, dtype: str, console: Console) -> None:
    from moa.demo import answers_of_fresh_process

    instructions: Sequence[str] = [row["instruction"] for row in data.rows[:SHOWN]]
    answers = answers_of_fresh_process(adapter, instructions, dtype)
    for instruction, old, answer in zip(instructions, before.items[:SHOWN], answers, strict=True):
        console.print(Text.assemble(("?", "dim"), f" {instruction.partition(chr(10))[2].strip()}"))
        console.print(side_by_side(old.gold, old.text, answer))
        console.print()


def _farewell(adapter: Path, request: str, dtype: str, seconds: float, console: Console) -> None:
    size = sum(file.stat().st_size for file in adapter.glob("adapter_*")) / 1e6
    lines = [
        f"Done in {seconds / 60:.1f} minutes. In {adapter}: the adapter ({size:.1f} MB), its recipe, all answers.",
        "",
        "Try next:",
        f"  moa generate {adapter} {json.dumps(' '.join(request.split()), ensure_ascii=False)}",
        f"  moa eval {adapter} --data tasks:bookings --limit 500 --dtype {dtype}",
        f"  moa inspect {adapter}",
        "  moa recipes ls",
    ]
    console.print("\n".join(lines), soft_wrap=True)
