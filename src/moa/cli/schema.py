"""``moa schema``."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):  # typer offers the members as choices
    """What has a schema."""

    recipe = "recipe"
    spans = "spans"
    study = "study"


def schema(kind: Annotated[Kind, typer.Argument(help="recipe, spans (a span recipe) or study.")]) -> None:
    """Print the JSON Schema of a settings file, by which editors complete and check its keys.

    For example `moa schema recipe > recipe.schema.json`, and as the first line of the recipe, for editors with a YAML
    language server: `# yaml-language-server: $schema=recipe.schema.json`
    """
    from moa.cli.keys import class_of
    from moa.settings import schema as schema_of

    typer.echo(json.dumps(schema_of(class_of("span recipe" if kind == Kind.spans else kind)), indent=2))
