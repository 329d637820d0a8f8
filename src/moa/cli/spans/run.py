"""``moa spans run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa.cli.options import Template
from moa.cli.spans.command import Recipe, begin, load_model, tell

if TYPE_CHECKING:
    from moa.cli.spans.recipe import SpanRecipe


def run(
    context: typer.Context,
    recipe: Recipe,
    prompt: Annotated[str | None, typer.Option(help="The prompt. Default: all of standard input.")] = None,
    spans: Annotated[
        Path | None, typer.Option(help="A span plan, ours or a published one. Default: what `validate` chose.")
    ] = None,
    template: Annotated[
        Template | None, typer.Option(help="Prompt template. Default: the model's chat template, if it has one.")
    ] = None,
) -> None:
    """Step 5: answer a prompt under the plan, and say what the KV cache takes against the dense one.

    For example `moa spans run my-recipe.yaml < question.txt`, or with a plan of your own:
    `moa spans run my-recipe.yaml --prompt "Once upon a time" --template none --spans moa_alpha_beta.json`.
    """
    import torch

    from moa import _hosts
    from moa.evaluation.generation import context as context_of
    from moa.spans.plan import SpanPlan
    from moa.spans.runtime.application import apply_spans

    settings = begin(recipe, context.args)
    file = spans or _plan_file(settings)
    chosen = SpanPlan.load(file)
    text = sys.stdin.read() if prompt is None else prompt
    model, tokenizer = load_model(settings)
    tokens = torch.tensor([_tokens(tokenizer, text, template)], device=model.device)
    if (longest := tokens.shape[1] + settings.max_new_tokens) > (most := context_of(model)):
        raise ValueError(
            f"prompt and answer (max_new_tokens={settings.max_new_tokens}) take up to {longest} tokens, "
            f"but the model's context is {most}"
        )
    with apply_spans(model, chosen):
        output = _answer(model, tokenizer, tokens, settings.max_new_tokens)
    _tell_sizes(model, _hosts.cache_of(output), output.sequences.shape[1] - 1)  # the last token is in no cache yet


def _plan_file(settings: SpanRecipe) -> Path:
    if len(settings.density) > 1:
        raise ValueError(f"density={settings.density}: an answer is given under one plan; name one with --density")
    file = settings.plans(settings.density[0]).plan_file
    if not file.exists():
        raise FileNotFoundError(f"there is no plan {str(file)!r}; `moa spans validate` writes it, or give --spans")
    return file


def _tokens(tokenizer: Any, text: str, template: str | None) -> list[int]:
    from moa.data import prompt_of, prompt_tokens

    template = template or ("chat" if tokenizer.chat_template else "none")
    return prompt_tokens(tokenizer, prompt_of({"instruction": text}, template))


def _answer(model: Any, tokenizer: Any, tokens: Any, max_new_tokens: int) -> Any:
    import torch
    from transformers import TextStreamer

    from moa.decoding import generate_by
    from moa.evaluation.generation import greedy

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    config = greedy(model, tokenizer, max_new_tokens)
    config.return_dict_in_generate = True
    mask = torch.ones_like(tokens)
    return generate_by(config, model, input_ids=tokens, attention_mask=mask, streamer=streamer)


def _tell_sizes(model: Any, cache: Any, length: int) -> None:
    """Say what the cache holds and has room for, counted on its tensors, and what a dense one would hold."""
    from moa.spans.model import ModelShape
    from moa.spans.plan import SpanPlan
    from moa.spans.runtime.cache import cache_bytes

    shape = ModelShape.of(model)
    held, room = cache_bytes(cache, used=True), cache_bytes(cache)
    dense = SpanPlan.dense(shape.layers, shape.kv_heads).kv_bytes(model, length)
    tell(
        f"KV cache after {length} tokens: {held:,} bytes under the plan, {dense:,} dense ({held / dense:.1%}); "
        f"memory for {room:,}, as the text may go on"
    )
