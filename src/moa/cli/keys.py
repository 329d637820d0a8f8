"""Verbs whose settings come from a file: every key of the file is a flag, too, and is listed in the help page."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table
from typer.core import TyperCommand

from moa.cli.errors import say
from moa.cli.terminal import terminal

KINDS = ("recipe", "span recipe", "study")

ANY_FLAG: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of such verbs; the flags are left in ``context.args``."""


class KeysCommand(TyperCommand):
    """Adds every key to the help page."""

    kind = "recipe"

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from moa.recipes import names
        from moa.settings import describe

        title = f"Keys of a {self.kind}; each is a flag, too: --key VALUE"
        table = Table(Column("key", no_wrap=True), "default", "meaning", title=title, title_justify="left", box=None)
        for name, default, doc in describe(class_of(self.kind)):
            table.add_row(f"--{name}", default, doc)
        console = terminal()
        console.print(table)
        if shipped := names(self.kind):
            console.print(f"Those that ship with moa: {', '.join(shipped)}")


class SpanKeysCommand(KeysCommand):
    """Of a span recipe."""

    kind = "span recipe"


class StudyKeysCommand(KeysCommand):
    """Of a study."""

    kind = "study"


def class_of(kind: str) -> Any:
    """The class of settings that a kind of file holds."""
    if kind == "study":
        from moa.studies.study import Study

        return Study
    if kind == "span recipe":
        from moa.cli.spans.recipe import SpanRecipe

        return SpanRecipe
    from moa.training.recipe import Recipe

    return Recipe


def flags(arguments: list[str]) -> dict[str, str | list[str]]:
    """``["--a.b", "1", "--c=2", "--d", "3", "4"]`` to ``{"a.b": "1", "c": "2", "d": ["3", "4"]}``.

    Of a flag that comes twice the last one counts, which is told.

    Raises:
        ValueError: an argument before the first flag, or a flag without a value.
    """
    found: dict[str, str | list[str]] = {}
    for flag, values in grouped(arguments):
        key, equals, value = flag.removeprefix("--").partition("=")
        values = [value, *values] if equals else values
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument {flag!r}: keys are given as --key VALUE")
        if not values:
            raise ValueError(f"--{key} needs a value: --{key} VALUE")
        if key in found:
            say(f"note: --{key} is given twice: the last one counts, {' '.join(values)}", style="yellow")
        found[key] = values[0] if len(values) == 1 else values
    return found


def grouped(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Every flag with the values that follow it."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--") or not found:
            found.append((argument, []))
        else:
            found[-1][1].append(argument)
    return found
