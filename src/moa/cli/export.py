"""``moa export``: adapters for tools that only take something else."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moa.cli.errors import say
from moa.cli.options import BaseOption, Dtype, DtypeOption, TemplateOption, check_places
from moa.files import check_place


class Target(StrEnum):  # typer offers the members as choices
    """What an adapter can become."""

    lora = "lora"


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[Path, typer.Option(help="Folder for the result, created if needed.")],
    to: Annotated[Target, typer.Option(help="What to write.")] = Target.lora,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="What to fit on, as for moa train; may be repeated. Default: what the adapter was trained on.",
            metavar="SOURCE",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=10, help="Rows of each source; every fifth is measured on.")] = 320,
    rank: Annotated[int | None, typer.Option(min=1, help="Default: as many parameters as the mixture has.")] = None,
    steps: Annotated[int, typer.Option(min=0, help="Of the fit; 0: the mean of the LoRA experts as it is.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 8,
    max_loss_gap: Annotated[
        float, typer.Option(help="Write nothing if the answer loss is further above the mixture's, nats per token.")
    ] = 0.05,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Write nothing if fewer of the mixture's greedy tokens are chosen.")
    ] = 0.95,
    base: BaseOption = None,
    template: TemplateOption = None,
    dtype: DtypeOption = Dtype.auto,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of rows and the fit.")] = 0,
) -> None:
    """Write an adapter as plain LoRA, which PEFT, vLLM and llama.cpp load and which merges.

    LoRA experts without a router and with one copy each are LoRA already, and come out exactly. A mixture with gates is
    none: a LoRA is fitted to it on text, and how far it is from the mixture on rows it was not fitted on is printed and
    kept in gap.json. If that is too far, nothing is written.

    Examples:
        `moa export runs/plain --output runs/my-lora`

        `moa export runs/mixture --output runs/my-lora --data train.jsonl --rank 32 --steps 500`
    """
    check_places(str(adapter))
    check_place(output, "--output", folder=True)
    if output.resolve() == adapter.resolve():
        raise ValueError(
            f"--output={str(output)!r} is the adapter itself, which a LoRA would replace: name another folder"
        )
    from moa.integrations import lora
    from moa.training.base import check_folder
    from moa.training.spans import plan_beside

    if adapter.is_dir():
        check_folder(adapter)
    if plan_beside(str(adapter)) is not None:
        say(
            f"note: {adapter} was trained under a span plan, which a LoRA does not carry: it is made and measured dense"
        )
    if lora.is_exact(adapter):
        written = lora.to_lora(adapter, output)
        modules = ", ".join(sorted(written.target_modules or []))
        typer.echo(f"wrote {output} ({to.value}, rank {written.r}, on {modules})")
        return
    from moa.cli.tables import progress_bar
    from moa.cli.terminal import terminal
    from moa.data import load_rows
    from moa.evaluation import models
    from moa.integrations.fitted_lora import fit_lora, save, sources_of_training

    sources = data or sources_of_training(str(adapter))
    rows = [row for source in sources for row in load_rows(source, split="train", limit=limit, seed=seed)]
    loaded = models.load(str(adapter), base, dtype=dtype, template=template, spans="none")
    with progress_bar(terminal()) as bar:
        line = bar.add_task("fitting LoRA to the mixture", total=steps)
        student, gap = fit_lora(
            loaded.model,
            loaded.tokenizer,
            rows,
            template=loaded.template,
            rank=rank,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            progress=lambda step: bar.update(line, completed=step),
        )
    gap.check(max_loss_gap, min_agreement)
    save(student, gap, output)
    typer.echo(f"wrote {output}, a LoRA that is near the mixture and not the same: {gap}")
