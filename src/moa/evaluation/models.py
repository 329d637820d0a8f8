"""A base model with or without an adapter, with the prompt template that belongs to it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from moa.assets import EMBEDDED
from moa.choices import check_choice, named
from moa.data.templates import CHAT, TEMPLATE_NAMES
from moa.data.tokens import check_template
from moa.places import on_hub
from moa.spans import apply_spans
from moa.training.base import adapter_base, load_adapter, load_base
from moa.training.beside import beside
from moa.training.recipe import FILE_NAME, Recipe
from moa.training.spans import plan_for_use


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate.

    Attributes:
        model: in evaluation mode.
        tokenizer: of the base model.
        base: the base model's name.
        template: the prompt template to use.
    """

    model: Any
    tokenizer: Any
    base: str
    template: str

    @property
    def about(self) -> dict[str, str]:
        """What results are kept with: base, template and dtype."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"base": self.base, "template": self.template, "dtype": dtype}


def load(
    adapter: str | None = None,
    base: str | None = None,
    *,
    dtype: str = "auto",
    template: str | None = None,
    spans: str | None = None,
) -> Loaded:
    """Load a model to generate with.

    Args:
        adapter: folder or hub name of a trained adapter; None: the base model as it is.
        base: as for `moa.models.find`; None: what the adapter was trained on, or ``embedded``.
        dtype: of the base model, as in `moa.training.base.load_base`.
        spans: path of a span plan to attend by, ``none`` for dense attention; None: what the adapter was trained under.
        template: one of `moa.data.TEMPLATE_NAMES`; None: what the adapter was trained with, or else the base's own chat
            template, or ``alpaca`` if it has none (``short`` for the embedded base).

    Raises:
        ValueError: model, adapter, dtype or template cannot be used.
        FileNotFoundError: no such folder.
    """
    if template is not None:
        check_choice("template", template, TEMPLATE_NAMES)
    said_by = nullcontext() if base or adapter is None else named(f"the base model of {adapter}")
    base = base or (_trained_on(adapter) if adapter else "embedded")
    plan = plan_for_use(adapter, spans)
    with said_by:
        model, tokenizer = load_base(base, dtype, device_map="auto")
    template = template or (_trained_with(adapter) if adapter else None) or _usual(base, tokenizer, adapter)
    check_template(tokenizer, template, base)
    loaded: Any = load_adapter(model, adapter) if adapter else model
    if plan is not None:
        with named(f"the span plan of {spans or adapter}"):
            apply_spans(loaded, plan)
    return Loaded(loaded.eval(), tokenizer, base, template)


def _trained_on(adapter: str) -> str:
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path if on_hub(adapter) else adapter_base(adapter)
    if not base:
        raise ValueError(f"the adapter {adapter} does not say which base model it belongs to: name it with --base")
    return base


def _trained_with(adapter: str) -> str | None:
    recipe = beside(adapter, FILE_NAME)
    return Recipe.load(recipe).data.template if recipe else None


def _usual(base: str, tokenizer: Any, adapter: str | None) -> str:
    """The template to use where nothing says which."""
    template = CHAT if tokenizer.chat_template else "short" if base in EMBEDDED else "alpaca"
    if adapter:
        print(
            f"note: there is no {FILE_NAME} with the adapter {adapter} that would say how it was prompted in training; "
            f"taking the template {template}",
            file=sys.stderr,
        )
    return template
