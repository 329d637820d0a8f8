"""`moa eval`: greedy accuracy on bundled tasks, local files, folders and hub data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moa.cli.options import (
    BaseOption,
    DataOption,
    Dtype,
    DtypeOption,
    NewTokensOption,
    SeedOption,
    SpansOption,
    TemplateOption,
    check_places,
)
from moa.cli.tables import accuracy_table, progress_bar


def evaluate(
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
) -> None:
    """Measure accuracy: greedy answers, fixed extraction rules, 95 % intervals.

    Examples:
        `moa eval runs/my-adapter --data tasks:all --limit 100`

        `moa eval runs/my-adapter --data data/gsm8k --data data/boolq --output results/mine.json`

        `moa eval --base Qwen/Qwen3-8B --data openai/gsm8k:main --limit 200`
    """
    check_places(adapter, spans)
    from moa.evaluation import models
    from moa.evaluation.results import as_json, family_means, write
    from moa.evaluation.sets import evaluate_sets, load_all

    sources = data or ["tasks:all"]
    sets = load_all(sources, limit=limit, seed=seed, max_new_tokens=max_new_tokens)
    loaded = models.load(adapter, base, dtype=dtype, template=template, spans=spans)
    console = Console()
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
    console.print(accuracy_table(outcomes, family_means(outcomes)))
    if output is not None:
        settings = {
            "base": loaded.base,
            "adapter": adapter,
            "spans": spans,
            "data": sources,
            "limit": limit,
            "seed": seed,
            "template": loaded.template,
            "batch_size": batch_size,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "decoding": "greedy",
        }
        write(output, as_json(outcomes, settings))
        console.print(f"settings and every answer: {output}", markup=False, highlight=False)
