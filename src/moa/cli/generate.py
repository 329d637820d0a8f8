"""`moa generate`: one prompt, many from standard input, or a conversation of single questions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa.cli.options import BaseOption, Dtype, DtypeOption, SpansOption, TemplateOption, check_places

if TYPE_CHECKING:
    from moa.data import Prompt


def generate(
    adapter: Annotated[
        str | None, typer.Argument(help="Folder or hub name of the adapter; '-' for the base model alone.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The instruction. Without one: a prompt to type at, or one instruction per input line."),
    ] = None,
    base: BaseOption = None,
    spans: SpansOption = None,
    template: TemplateOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy. Above 0: sample.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Write answers as they come, token by token.

    Examples:
        `moa generate runs/my-adapter "Sort these numbers from smallest to largest: 31, 7, 12."`

        `moa generate - "Once upon a time" --template none`

        `moa generate runs/my-adapter < questions.txt`
    """
    adapter = None if adapter == "-" else adapter
    check_places(adapter, spans)
    import torch

    from moa.data import prompt_of
    from moa.evaluation import models

    loaded = models.load(adapter, base, dtype=dtype, template=template, spans=spans)
    torch.manual_seed(seed)
    for instruction in _instructions() if prompt is None else [prompt]:
        asked = prompt_of({"instruction": instruction}, loaded.template)
        _answer(loaded.model, loaded.tokenizer, asked, max_new_tokens, temperature)


def _answer(model: Any, tokenizer: Any, prompt: Prompt, max_new_tokens: int, temperature: float) -> None:
    """Stream the continuation of a prompt to standard output; it ends at the latest where the context does."""
    import torch
    from transformers import TextStreamer

    from moa.data import prompt_tokens
    from moa.decoding import generate_by
    from moa.evaluation.generation import context, greedy

    tokens = torch.tensor([prompt_tokens(tokenizer, prompt)], device=model.device)
    room = context(model) - tokens.shape[1]
    if room < 1:
        raise ValueError(f"the prompt has {tokens.shape[1]} tokens, but the model's context is {context(model)}")
    settings = greedy(model, tokenizer, min(max_new_tokens, room))
    if temperature > 0:
        settings.do_sample, settings.temperature = True, temperature
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    mask = torch.ones_like(tokens)
    generate_by(settings, model, input_ids=tokens, attention_mask=mask, streamer=streamer)


def _instructions() -> Iterator[str]:
    """Lines of standard input; at a terminal, asked for one by one until an empty line or Ctrl-D."""
    if not sys.stdin.isatty():
        lines = (line.removeprefix("\ufeff").strip() for line in sys.stdin)  # a file may begin with a byte order mark
        yield from (line for line in lines if line)
        return
    print("Type an instruction; an empty line or Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        yield line
