"""The command ``moa``: one file per verb. Heavy libraries are imported inside the verbs."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from moa.cli.bench import bench
from moa.cli.demo import demo
from moa.cli.env import env
from moa.cli.errors import Commands, show_traces
from moa.cli.evaluate import evaluate
from moa.cli.export import export
from moa.cli.generate import generate
from moa.cli.import_reference import import_reference
from moa.cli.inspect import inspect
from moa.cli.keys import ANY_FLAG, KeysCommand, StudyKeysCommand
from moa.cli.recipes import recipes
from moa.cli.schema import schema
from moa.cli.serve import serve
from moa.cli.spans import spans
from moa.cli.train import train
from moa.cli.watch import watch

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MOA_DEBUG", help="Show a stack trace with every error.")
    ] = False,
) -> None:
    """Fine-tune Hugging Face language models with heterogeneous mixtures of adapters."""
    show_traces(debug)
    # PEFT and TRL still ask transformers by the old name; the user can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


app.command()(demo)
app.command(cls=KeysCommand, context_settings=ANY_FLAG)(train)
app.command(cls=StudyKeysCommand, context_settings=ANY_FLAG)(bench)
app.command()(watch)
app.add_typer(recipes, name="recipes")
app.add_typer(spans, name="spans")
app.command("eval")(evaluate)
app.command()(generate)
app.command()(inspect)
app.command()(export)
app.command(context_settings=ANY_FLAG)(serve)
app.command()(import_reference)
app.command()(schema)
app.command()(env)
