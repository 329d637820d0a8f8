"""What the verbs of ``moa spans`` share: recipe and flags, the model, a progress bar, the hint what comes next."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa.cli.keys import flags
from moa.cli.terminal import terminal

if TYPE_CHECKING:
    from moa.cli.spans.recipe import SpanRecipe
    from moa.spans.evidence.items import Item

Recipe = Annotated[str, typer.Argument(help="A span recipe file, or the name of one that ships with moa.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start this step over instead of going on with it.")]


def begin(name: str, arguments: list[str]) -> SpanRecipe:
    """The recipe with its flags. Nothing is written: a step that is refused leaves every file as it was.

    Raises:
        ValueError: the recipe is wrong, or a folder that it names is a file.
    """
    from moa.cli.spans.recipe import SpanRecipe

    recipe = SpanRecipe.load(name, flags(arguments))
    for key, folder in (("output", recipe.folder), ("evidence", recipe.profiled)):
        if folder.is_file():
            raise ValueError(f"{key}={str(folder)!r} is a file, not a folder")
    return recipe


@contextmanager
def replaced(paths: Iterable[Path], yes: bool) -> Iterator[None]:
    """With ``yes``, files step aside for those of the step inside.

    If that is refused before it has written a file in their place, they come back.
    """
    aside = {path: path.with_name(f".{path.name}.old") for path in paths if yes and path.exists()}
    for path, old in aside.items():
        path.replace(old)
    try:
        yield
    finally:
        for path, old in aside.items():
            if path.exists():
                old.unlink()
            else:
                old.replace(path)


def load_model(recipe: SpanRecipe) -> tuple[Any, Any]:
    """The recipe's model in evaluation mode, and its tokenizer."""
    from moa.training.base import load_base

    model, tokenizer = load_base(recipe.base, recipe.dtype, device_map="auto")
    return model.eval(), tokenizer


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with time left; gives a function of finished and all."""
    from moa.cli.tables import progress_bar

    with progress_bar(terminal(stderr=True)) as progress:
        line = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(line, completed=done, total=total)


def items_of(path: Path, length: int, wanted: int) -> list[Item]:
    """The items of one length; tells if there are fewer than ``wanted``, since `calibrate` may have been stopped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or no items of that length.
    """
    from moa.spans.evidence.calibration import load_items

    found = load_items(path, length)
    if len(found) < wanted:
        tell(
            f"note: {path} has {len(found)} of {wanted} items of {length} tokens: `moa spans calibrate` was stopped, "
            "or its source has no more"
        )
    return found


def tell(message: str) -> None:
    """One line for the user."""
    terminal().print(message, soft_wrap=True)


def next_step(verb: str, name: str, arguments: list[str]) -> None:
    """The command to run now, with the flags that this one was given."""
    import shlex

    tell(f"next: {shlex.join(['moa', 'spans', verb, name, *arguments])}")
    sys.stdout.flush()
