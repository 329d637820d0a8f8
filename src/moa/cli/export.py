"""``moa export``: adapters for tools that only take something else."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):  # typer offers the members as choices
    """What an adapter can become."""

    lora = "lora"


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[Path, typer.Option(help="Folder for the result, created if needed.")],
    to: Annotated[Target, typer.Option(help="What to write.")] = Target.lora,
) -> None:
    """Write an adapter as plain LoRA, where that computes the same: LoRA experts, no router, one copy of each.

    A mixture with gates is refused, because no single matrix computes what depends on the token.

    Example: moa export runs/my-adapter --to lora --output runs/my-lora
    """
    from moa.integrations.lora import to_lora

    lora = to_lora(adapter, output)
    typer.echo(f"wrote {output} ({to.value}, rank {lora.r}, on {', '.join(sorted(lora.target_modules or []))})")
