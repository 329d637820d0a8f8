"""``moa spans export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa.cli.options import Dtype, DtypeOption
from moa.cli.spans.command import tell
from moa.files import check_place

if TYPE_CHECKING:
    from moa.spans.plan import SpanPlan


class Form(StrEnum):  # typer offers the members as choices
    """What a plan can become."""

    heads = "heads"
    layers = "layers"


def export(
    plan: Annotated[Path, typer.Argument(help="A span plan, or the folder of one.")],
    base: Annotated[str, typer.Option(help="The model that it was searched for, as in a recipe.")],
    output: Annotated[Path, typer.Option(help="Folder for the model, which must not exist.")],
    to: Annotated[
        Form,
        typer.Option(
            help="heads: KV heads in the order of their two classes, the same numbers. layers: one window for whole "
            "layers, which vLLM and transformers run today, at a price."
        ),
    ],
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text. Default: the length that the plan was validated at.")
    ] = None,
    items: Annotated[
        Path | None, typer.Option(help="Items of that length, to measure the price on: held_out.jsonl of `calibrate`.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Write a model that engines without spans can serve, and what that costs beside the plan.

    For example `moa spans export runs/my/density-0.5 --base smollm2 --to layers --output served --items
    runs/my/held_out.jsonl`.
    """
    from moa.spans.evidence.calibration import load_items
    from moa.spans.export import layer_windows, measured, save, two_class
    from moa.spans.plan import SpanPlan
    from moa.spans.runtime.application import apply_spans
    from moa.training.base import load_base

    if output.exists():
        raise ValueError(f"output={str(output)!r} exists; name a new folder")
    check_place(output, "output", folder=True)
    chosen = SpanPlan.load(plan)
    tokens = length or _validated_at(chosen)
    asked = load_items(items, tokens) if items is not None else []
    model, tokenizer = load_base(base, dtype.value)
    model.eval()
    price: dict[str, Any] = {"items": len(asked)}
    if asked:
        price["dense"] = measured(model, asked)
    with apply_spans(model, chosen):  # whether it is for this model, too
        if asked:
            price["plan"] = measured(model, asked)
    exported = (two_class if to is Form.heads else layer_windows)(model, chosen, tokens)
    about = {"form": to.value, "base": base, "plan": str(plan), "length": tokens}
    file = save(model, exported, output, {**about, "price": price})
    tokenizer.save_pretrained(output)
    if asked:
        price["exported"] = _price_of_the_written(output, exported.plan, dtype.value, asked)
        file = save(model, exported, output, {**about, "price": price})
    _tell(file, exported.kv_bytes, price)


def _validated_at(plan: SpanPlan) -> int:
    found = plan.searched.get("validation", {}).get("length")
    if found is None:
        raise ValueError("the plan does not say at which length it was validated; give --length, the tokens of a text")
    return int(found)


def _price_of_the_written(folder: Path, plan: SpanPlan | None, dtype: str, items: list[Any]) -> dict[str, float]:
    from contextlib import nullcontext

    from moa.spans.export import measured
    from moa.spans.runtime.application import apply_spans
    from moa.training.base import load_base

    model, _ = load_base(str(folder), dtype)
    with apply_spans(model.eval(), plan) if plan is not None else nullcontext():
        return measured(model, items)


def _tell(file: Path, kv_bytes: dict[str, int], price: dict[str, Any]) -> None:
    for name, held in kv_bytes.items():
        found = price.get(name)
        cost = "" if found is None else f", loss {found['loss']:.3f}, {found['right']:.0%} of the answers right"
        tell(f"{name}: {held:,} bytes of KV cache ({held / kv_bytes['dense']:.0%}){cost}")
    tell(f"wrote {file.parent} ({file.name} says where heads or layers are cut)")
