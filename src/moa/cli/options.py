"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Base model: smollm2, a folder, a .gguf file, owner/name on the hub, embedded or embedded-long. "
        "Default: what the adapter was trained on.",
    ),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Of the base model: auto, float32, bfloat16 or float16.")]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="Prompt template: alpaca, short, chat (the tokenizer's own), or none. Default: what the adapter was "
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
