"""``moa train``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperCommand


class TrainCommand(TyperCommand):
    """Adds every key of a recipe to the help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from moa.training.knobs import describe
        from moa.training.recipe import Recipe

        table = Table(
            Column("flag", no_wrap=True), "default", "meaning", title="Recipe keys", title_justify="left", box=None
        )
        for name, default, doc in describe(Recipe):
            table.add_row(f"--{name}", default, doc)
        Console().print(table)


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a name from `moa recipes ls`.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
) -> None:
    """Fine-tune a base model as a recipe says; any key of the recipe is a flag, too.

    For example `moa train embedded-soft-moa --max_steps 20 --output out`, or
    `moa train mine.yaml --learning_rate 1e-4 --adapter.r 16 --data.train train.jsonl`.

    The adapter, a model card, the resolved recipe and the training log are saved in the output folder. A run that was
    stopped or killed goes on with `--resume`, to the same result.
    """
    from moa.training.recipe import Recipe

    resolved = Recipe.load(recipe, flags(context.args))
    from moa.training.sft import train as run

    folder = run(resolved, resume=resume, overwrite=overwrite)
    Console().print(f"saved the adapter in {folder}", markup=False, highlight=False, soft_wrap=True)


def flags(arguments: list[str]) -> dict[str, str]:
    """``["--a.b", "1", "--c=2"]`` to ``{"a.b": "1", "c": "2"}``.

    Raises:
        ValueError: an argument that is no flag, or a flag without a value.
    """
    found: dict[str, str] = {}
    rest: Any = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ValueError(f"unexpected argument {argument!r}: keys of the recipe are given as --key value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ValueError(f"--{key} needs a value: --{key} VALUE")
        found[key.replace("-", "_")] = value
    return found
