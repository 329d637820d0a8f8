"""The README.md of a trained adapter: metadata for the hub, how to load it, how it was trained, what it can."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from moa.assets import EMBEDDED
from moa.models import NAMED
from moa.places import on_hub
from moa.training.recipe import FILE_NAME, Recipe

if TYPE_CHECKING:
    from moa.evaluation.accuracy import Result
    from moa.evaluation.sets import EvaluationSet

_BODY = """---
{metadata}
---

# {name}

A Mixture of Adapters for `{base}`, trained with the library `moa`.

## Use

With `pip install moa-lm`, PEFT loads it like any other adapter.

```python
{load}
```

`moa generate path/to/this/folder "..."` asks it in the form that it was trained in.
{gates}
## Training

{steps} optimizer steps, {trainable:,} trainable parameters, last training loss {loss:.4f}.
Prompt template: `{template}`. Data: {data}.
Every setting is in `{recipe_file}`; `moa train {recipe_file}` repeats the run.
"""


_LOAD_HUB = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""

_LOAD_NAMED = """from moa.training.base import load_adapter, load_base

base, tokenizer = load_base("{base}")
model = load_adapter(base, "path/to/this/folder")"""


def write_card(
    folder: Path,
    recipe: Recipe,
    *,
    name: str,
    steps: int,
    loss: float,
    trainable: int,
    log: Mapping[str, float] | None = None,
) -> None:
    """Write ``README.md`` into ``folder``; ``log`` is the last entry of the training log with router figures."""
    named = recipe.base in EMBEDDED or recipe.base in NAMED
    hub = NAMED[recipe.base].hub if recipe.base in NAMED else recipe.base if on_hub(recipe.base) else None
    metadata = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=hub,
        tags=["moa", "mixture-of-adapters", *([f"base_model:adapter:{hub}"] if hub else [])],
    )
    base = recipe.base if hub or named else Path(recipe.base).name
    text = _BODY.format(
        metadata=metadata.to_yaml(),
        name=name,
        base=base,
        gates=_gates(log or {}),
        load=(_LOAD_NAMED if named else _LOAD_HUB).format(base=base),
        steps=steps,
        trainable=trainable,
        loss=loss,
        template=recipe.data.template,
        data=", ".join(f"`{_public(source)}`" for source in recipe.data.train),
        recipe_file=FILE_NAME,
    )
    ModelCard(text).save(folder / "README.md")


def add_accuracy(folder: Path, data: EvaluationSet, results: Mapping[str, Result]) -> None:
    """Add to the card in ``folder`` what was measured, with the last of ``results`` as metadata for the hub.

    Args:
        folder: of the adapter.
        data: what it was measured on.
        results: by what answered.
    """
    card = ModelCard.load(folder / "README.md")
    head = "| | rows | accuracy | 95 % interval |\n|---|---|---|---|\n"
    lines = []
    for name, result in results.items():
        low, high = result.interval
        lines.append(f"| {name} | {len(result.items)} | {result.accuracy:.1%} | {low:.1%} to {high:.1%} |")
    card.text = f"{card.text.rstrip()}\n\n## Accuracy\n\nOn {data.name}, greedy.\n\n{head}" + "\n".join(lines) + "\n"
    accuracy = [*results.values()][-1].accuracy
    card.data.model_name = folder.resolve().name
    card.data.eval_results = [EvalResult("text-generation", data.name, data.name, "accuracy", accuracy)]
    card.save(folder / "README.md")


_BAR = 20  # letters for the largest figure
_USED = "router/utilisation/"


def _gates(log: Mapping[str, float]) -> str:
    """How much each expert was used at the end of training, as bars; empty without routers."""
    used = {name.removeprefix(_USED): value for name, value in log.items() if name.startswith(_USED)}
    if not used:
        return ""
    widest, largest = max(map(len, used)), max(used.values()) or 1.0
    order = sorted(used.items(), key=lambda item: (-item[1], item[0]))  # a checkpoint does not keep the blocks' own
    bars = [f"{name:{widest}} {'█' * round(value / largest * _BAR):{_BAR}} {value:.2f}" for name, value in order]
    return (
        "\n## Experts\n\nEach one's part of all gates, over an equal part, in the last training steps; mean of all "
        f"blocks. {log['router/dead']:.0%} of the experts hardly act.\n\n```text\n" + "\n".join(bars) + "\n```\n"
    )


def _public(source: str) -> str:
    """A data source without the folders of this machine."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source
