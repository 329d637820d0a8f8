"""`moa import-reference`: adapters that were trained with the official implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moa.files import check_place


def import_reference(
    source: Annotated[
        Path, typer.Argument(help="Official adapter: a folder, or its adapter.pth, .bin or .safetensors file.")
    ],
    base: Annotated[str, typer.Option(help="The base model it was trained on: a name on the Hub, or a folder.")],
    output: Annotated[Path, typer.Option(help="Folder for the MoA adapter, created if needed.")],
    variant: Annotated[
        str | None,
        typer.Option(
            help="Which official model it is: soft or sparse (transformers path), LLaMA3_soft_moa, LLaMA3_sparse_moa, "
            "LLaMA3_soft_moa_instance, LLaMA3_UniPEFT, LLaMA3_soft_moe or LLaMA3_sparse_moe. Found out from the files "
            "if they tell."
        ),
    ] = None,
) -> None:
    """Convert an adapter of the official MoA implementation into an ordinary MoA adapter.

    The result computes the same outputs and loads with PeftModel.from_pretrained. Weights in .pth and .bin files are
    read as tensors only; the base model's weights are not needed.

    Example: moa import-reference exp/adapter --base meta-llama/Llama-3.1-8B-Instruct --output adapters/official
    """
    check_place(output, "--output", folder=True)
    if output.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise ValueError(f"--output={str(output)!r} holds the official adapter: name another folder, which keeps it")
    from moa.adapters.reference import files as reference_files

    config = reference_files.import_reference(source, base, output, variant)
    kinds = ", ".join(expert.kind for expert in config.experts)
    typer.echo(f"wrote {output} (experts: {kinds}; base: {base})")
