"""``moa recipes``: list, copy and validate recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from moa.cli.keys import ANY_FLAG, KeysCommand, flags
from moa.cli.terminal import terminal

recipes = typer.Typer(no_args_is_help=True, help="List, copy and validate recipes.")

Name = Annotated[str, typer.Argument(help="A recipe file, or a name from `moa recipes ls`.")]


@recipes.command("ls")
def list_recipes() -> None:
    """List the recipes that ship with moa."""
    from moa.recipes import find, names

    table = Table("recipe", "what it does", box=None)
    for name in names():
        table.add_row(name, find(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    terminal().print(table)


@recipes.command("cp")
def copy_recipe(
    name: Name,
    target: Annotated[Path | None, typer.Argument(help="A file or folder; default: NAME.yaml here.")] = None,
) -> None:
    """Copy a recipe, to change it. An existing file is never replaced."""
    from moa.recipes import find

    source = find(name)
    file = target or Path(source.name)
    file = file / source.name if file.is_dir() else file
    if file.exists():
        raise ValueError(f"{file} exists already: name another file")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(file.parent)!r}")
    file.write_bytes(source.read_bytes())
    terminal().print(f"copied to {file}; run it with: moa train {file}", soft_wrap=True)


@recipes.command("validate", cls=KeysCommand, context_settings=ANY_FLAG)
def validate_recipe(context: typer.Context, name: Name) -> None:
    """Check a recipe (with any --key value) and count its parameters, without loading weights or data."""
    from moa.training.recipe import Recipe
    from moa.training.validate import validate

    recipe = Recipe.load(name, flags(context.args))
    count = validate(recipe)
    table = Table("part", Column("parameters", justify="right"), box=None)
    for kind, number in count.by_kind.items():
        table.add_row(kind, f"{number:,}")
    table.add_row("adapter", f"{count.adapter:,}")
    if count.trainable < count.adapter:
        table.add_row("of these trained", f"{count.trainable:,}")
    table.add_row("with the base", f"{count.total:,}")
    console = terminal()
    console.print(table)
    console.print(f"{name}: valid ({recipe.base})", soft_wrap=True)
