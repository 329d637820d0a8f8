"""`moa eval`: greedy accuracy on bundled tasks, local files, folders and hub data sets."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moa.cli.options import (
    AddressOption,
    BaseOption,
    DataOption,
    Dtype,
    DtypeOption,
    EngineOption,
    NewTokensOption,
    SeedOption,
    SpansOption,
    TemplateOption,
    WorkersOption,
    check_places,
    elsewhere,
)
from moa.cli.tables import accuracy_table, progress_bar
from moa.cli.terminal import terminal
from moa.files import check_place


def eval(
    adapter: Annotated[
        str | None, typer.Argument(help="Folder or hub name of the adapter. Without one, the base model is measured.")
    ] = None,
    data: DataOption = None,
    base: BaseOption = None,
    spans: SpansOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows of each set, drawn at random.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for settings, accuracies and every answer.")] = None,
    template: TemplateOption = None,
    max_new_tokens: NewTokensOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward; does not change the answers.")] = 32,
    dtype: DtypeOption = Dtype.auto,
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    address: AddressOption = None,
) -> None:
    """Measure accuracy: greedy answers, fixed extraction rules, 95 % intervals.

    Examples:
        `moa eval runs/my-adapter --data tasks:all --limit 100`

        `moa eval runs/my-adapter --data data/gsm8k --data data/boolq --output results/mine.json`

        `moa eval --base Qwen/Qwen3-8B --data openai/gsm8k:main --limit 200`

        `moa eval runs/my-adapter --workers 4`
    """
    check_places(adapter, spans)
    if output is not None:
        check_place(output, "--output")
    where = elsewhere(engine, workers, address)
    from moa.evaluation.results import as_json, family_means, write
    from moa.evaluation.sets import load_all

    sources = data or ["tasks:all"]
    sets = load_all(sources, limit=limit, seed=seed, max_new_tokens=max_new_tokens)
    model = {"adapter": adapter, "base": base, "dtype": dtype, "template": template, "spans": spans}
    console = terminal()
    if where is None:
        outcomes, about = _one_after_the_other(console, sets, model, batch_size)
    else:
        logs = Path(f"{output.with_suffix('')}-logs" if output else tempfile.mkdtemp(prefix="moa-eval-"))
        outcomes, about = _in_processes(console, sets, model, batch_size, logs, where)
    console.print(accuracy_table(outcomes, family_means(outcomes)))
    if output is not None:
        asked = {"adapter": adapter, "spans": spans, "data": sources, "limit": limit, "seed": seed}
        settings = {**about, **asked, "batch_size": batch_size, "decoding": "greedy"}
        write(output, as_json(outcomes, settings))
        console.print(f"settings and every answer: {output}", soft_wrap=True)


Outcomes = tuple[list[Any], dict[str, str]]


def _one_after_the_other(console: Console, sets: list[Any], model: dict[str, Any], batch_size: int) -> Outcomes:
    from moa.evaluation.models import load
    from moa.evaluation.sets import evaluate_sets

    loaded = load(**model)
    with progress_bar(console) as bar:
        line = bar.add_task("", total=sum(len(found.rows) for found in sets))
        outcomes = evaluate_sets(
            loaded.model,
            loaded.tokenizer,
            sets,
            template=loaded.template,
            batch_size=batch_size,
            progress=lambda name, rows: bar.update(line, description=name, advance=rows),
        )
    return outcomes, loaded.about


def _in_processes(
    console: Console, sets: list[Any], model: dict[str, Any], batch_size: int, logs: Path, where: Any
) -> Outcomes:
    from moa.studies.divided import evaluate_on

    with progress_bar(console) as bar:
        line = bar.add_task("sets", total=len(sets))
        return evaluate_on(
            where, sets, model, batch_size=batch_size, logs=logs, told=lambda: bar.update(line, advance=1)
        )
