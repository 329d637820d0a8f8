"""The README.md beside a saved adapter, which PEFT starts as a form of empty headings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

TAGS = ("mixture-of-adapters", "moa")
OURS = re.compile(r"<!-- mixture -->.*?<!-- /mixture -->", re.DOTALL)
FORM = "# Model Card for Model ID"

LOAD = """## How to load

With `pip install moa-lm`, PEFT loads this adapter like any other:

```python
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoTokenizer

adapter = "path/to/this/adapter"
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained(PeftConfig.from_pretrained(adapter).base_model_name_or_path)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```
"""


def finish_card(folder: Path, config: Any) -> None:
    """Complete a card that PEFT may have written in ``folder``: tags, what is mixed, how to load.

    What a person wrote stays; PEFT's empty form is replaced, and our own summary is renewed.
    """
    file = folder / "README.md"
    if not file.is_file():
        return
    card = ModelCard.load(file)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *TAGS})
    summary = f"<!-- mixture -->\n{_summary(config)}\n<!-- /mixture -->"
    if FORM in card.text:
        card.text = f"\n# Mixture of Adapters\n\n{summary}\n\n{LOAD}"
    elif OURS.search(card.text):
        card.text = OURS.sub(lambda _: summary, card.text)
    elif LOAD not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{LOAD}"
    card.save(file)


def _summary(config: Any) -> str:
    """What is mixed, as a list."""
    lines = [f"- expert `{expert.kind}`: {_settings(expert)}" for expert in config.experts]
    router = "none, every expert is simply added" if config.router is None else _settings(config.router)
    return "\n".join([*lines, f"- router: {router}", f"- gating `{config.gating.kind}`: {_settings(config.gating)}"])


def _settings(part: Any) -> str:
    """The settings of an expert, router or gating that are plain values and not switched off."""
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    said = {name: value for name, value in values.items() if isinstance(value, int | float | str | list) and value}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in said.items()) or "as it is"
