"""``moa train``."""

from __future__ import annotations

from typing import Annotated

import typer

from moa.cli.keys import flags
from moa.cli.terminal import terminal


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
    terminal().print(f"saved the adapter in {folder}", soft_wrap=True)
