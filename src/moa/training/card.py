"""The README.md of a trained adapter: metadata for the hub, how to load it, how it was trained."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from moa.assets import EMBEDDED
from moa.models import NAMED
from moa.places import on_hub
from moa.training.recipe import FILE_NAME, Recipe

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


def write_card(folder: Path, recipe: Recipe, *, name: str, steps: int, loss: float, trainable: int) -> None:
    """Write ``README.md`` into ``folder``."""
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
        load=(_LOAD_NAMED if named else _LOAD_HUB).format(base=base),
        steps=steps,
        trainable=trainable,
        loss=loss,
        template=recipe.data.template,
        data=", ".join(f"`{_public(source)}`" for source in recipe.data.train),
        recipe_file=FILE_NAME,
    )
    ModelCard(text).save(folder / "README.md")


def _public(source: str) -> str:
    """A data source without the folders of this machine."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source
