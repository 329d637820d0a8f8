"""``moa spans``: from a model to a smaller KV cache, one verb per step. Every verb tells the next one."""

from __future__ import annotations

import typer

from moa.cli.keys import ANY_FLAG, SpanKeysCommand
from moa.cli.spans.calibrate import calibrate
from moa.cli.spans.export import export
from moa.cli.spans.profile import profile
from moa.cli.spans.run import run
from moa.cli.spans.search import search
from moa.cli.spans.validate import validate

spans = typer.Typer(
    no_args_is_help=True,
    help="Search a plan of attention spans for a model, and run the model with the smaller KV cache it allows. "
    "The steps, all with one recipe: calibrate, profile, search, validate, run. `export` writes a plan for engines.",
)

for _verb in (calibrate, profile, search, validate, run):
    spans.command(cls=SpanKeysCommand, context_settings=ANY_FLAG)(_verb)
spans.command()(export)
