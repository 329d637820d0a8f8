"""Options that several verbs share."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from moa.places import existing

if TYPE_CHECKING:
    from moa.studies.engine import Engine


class Dtype(StrEnum):
    """Of the base model; typer offers the members as choices."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Template(StrEnum):
    """The names of `moa.data.templates.TemplateName`."""

    alpaca = "alpaca"
    short = "short"
    chat = "chat"
    none = "none"


BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Base model: smollm2, a folder, a .gguf file, owner/name on the hub, embedded or embedded-long. "
        "Default: what the adapter was trained on.",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the base model.")]
TemplateOption = Annotated[
    Template | None,
    typer.Option(
        "--template",
        help="Prompt template; chat is the tokenizer's own, none the text as it is. Default: what the adapter was "
        "trained with; for a base model its chat template, if it has one.",
    ),
]
SpansOption = Annotated[
    str | None,
    typer.Option(
        "--spans",
        help="Span plan (JSON) to attend by, or none for dense attention. Default: what the adapter was trained under.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="So many at a time, each a process of one thread. Default: 1; all processors of a cluster.",
    ),
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="local, or ray: a cluster whose machines share the output folder.")
]
AddressOption = Annotated[str | None, typer.Option("--address", help="Of the Ray cluster, such as auto or HOST:6379.")]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="What to ask; may be repeated. tasks:all, tasks:NAME[,NAME], a .json or .jsonl file, a folder with "
        "test.jsonl, or owner/name on the hub. Default: tasks:all.",
        metavar="SOURCE",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the random draw of rows.")]
NewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=1, help="Longest answer. Default: 256, 40 for true/false, labels and bundled tasks."
    ),
]


def check_places(adapter: str | None, spans: str | None = None) -> None:
    """Raise FileNotFoundError for an adapter or a plan that cannot be there, before anything heavy is loaded."""
    if adapter is not None:
        existing(adapter, "adapter")
    if spans not in (None, "none"):
        existing(str(spans), "span plan")


def elsewhere(engine: str, workers: int | None, address: str | None) -> Engine | None:
    """Where work goes that flags divide among processes; None: it stays in this one."""
    if engine == "local" and workers is None:
        return None
    from moa.studies.engine import Engine

    return Engine(engine, workers, address)
