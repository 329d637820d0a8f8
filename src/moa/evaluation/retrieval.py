"""How well a model uses a long text: questions about it as rows of a data set, and its loss on running text.

Contract: rows have a prompt of their own and an answer of kind "begins" (`moa.evaluation.answers`), so that they are
trained on and asked like any others, through ``model.generate``: whatever is applied to the model (a span plan, an
adapter) is measured as it is used. Losses on running text count the second half of every window, so that each token
that counts has at least half a window before it.
"""

from __future__ import annotations

import itertools
import pydoc_data.topics
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from moa.assets import base_path
from moa.choices import check_choice
from moa.data.tokens import prompt_tokens
from moa.evaluation.generation import context
from moa.files import read_text
from moa.tasks import long_context
from moa.tasks.facts import Form, fact_texts
from moa.tasks.long_context import LONG_TASKS

LONG, TEXT = "long:", "text:"
FACTS = "facts"
MANUAL, NOVELS = "manual", "novels"
_CHARACTERS = 300_000  # of the manual that are taken

# Other facts, keys and wordings than those that plans are calibrated on (`moa.tasks.facts.FORMS`).
_SHIPS = "Aurora Falcon Neptune Victoria Orion Marina Phoenix Odessa Castor Juno Atlas Minerva".split()  # noqa: SIM905
_FRUITS = "apples pears plums cherries grapes lemons figs peaches melons quinces dates limes".split()  # noqa: SIM905
_COLOURS = "red blue green yellow white black brown grey orange purple golden silver".split()  # noqa: SIM905
_FORMS: tuple[Form, ...] = (
    (_SHIPS, "The ship {} carries {} crates.", "How many crates does the ship {} carry?", "The ship {} carries"),
    (_FRUITS, "A cart of {} costs {} coins.", "How many coins does a cart of {} cost?", "A cart of {} costs"),
    (_COLOURS, "The {} door opens with key {}.", "Which key opens the {} door?", "The {} door opens with key"),
)


@dataclass(frozen=True)
class TextSet:
    """Running text in windows.

    Attributes:
        name: for tables.
        text: what is read.
        length: tokens per window; windows do not overlap.
        windows: how many at most.
    """

    name: str
    text: str
    length: int
    windows: int


def is_long(source: str) -> bool:
    """Whether a source is made here: ``long:TASK@TOKENS`` or ``text:NAME@TOKENS``."""
    return source.startswith((LONG, TEXT))


def parse(source: str, shortest: int = long_context.SHORTEST) -> tuple[str, int]:
    """What stands before and after the ``@`` of ``long:lines@1024`` or ``text:novels@512``.

    Raises:
        ValueError: no number of tokens, or too small a one.
    """
    name, _, tokens = source.partition(":")[2].rpartition("@")
    if not name or not tokens.isdecimal() or int(tokens) < shortest:
        raise ValueError(f"{source!r} must name a task or text and at least {shortest} tokens, as in 'long:lines@1024'")
    return name, int(tokens)


def long_rows(tokenizer: Any, source: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with questions about long texts.

    Args:
        tokenizer: of the model; lengths are in its tokens, and facts are asked in its chat template if it has one.
        source: ``long:TASK@TOKENS`` with lines, needle, copying (`moa.tasks.long_context`) or facts, one question about
            each text of `moa.tasks.facts`. ``TOKENS`` is the most that a prompt and its answer take together.
        n: how many.
        seed: another seed draws other texts.

    Raises:
        ValueError: an unknown task, or a length that it has no room in.
    """
    task, length = parse(source)
    check_choice("long:", task, [*LONG_TASKS, FACTS])

    @lru_cache(maxsize=100_000)
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    if task == FACTS:
        texts = itertools.islice(fact_texts(_text(MANUAL), length, count, f"report/{seed}", _FORMS), n)
        pairs = [(_asked(tokenizer, f"{one.context}\n\n{one.asked[0].question}"), one.asked[0]) for one in texts]
        return [_row(f"{prompt}{asked.start}", f" {asked.answer}") for prompt, asked in pairs]
    specials = len(prompt_tokens(tokenizer, "a")) - count("a")
    return [_row(one.prompt, one.answer) for one in long_context.generate(task, length - specials, n, count, seed)]


def text_set(source: str, windows: int) -> TextSet:
    """The running text of ``text:NAME@TOKENS``: manual (Python's), novels (the built-in ones), or a file's path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or no number of tokens.
    """
    name, length = parse(source, shortest=2)
    return TextSet(f"{Path(name).stem}-{length}", _text(name), length, windows)


def text_losses(model: Any, tokenizer: Any, data: TextSet) -> list[float]:
    """Of every window, the mean cross-entropy of its second half, in nats per token.

    Raises:
        ValueError: the text has no whole window, or a window is too long for the model's context.
    """
    ids = torch.tensor(prompt_tokens(tokenizer, data.text))
    have = min(len(ids) // data.length, data.windows)
    if data.length > context(model) or have < 1:
        raise ValueError(
            f"{data.name}: {len(ids)} tokens make no window of {data.length} in a context of {context(model)}"
        )
    half, found = data.length // 2, []
    was_training = model.training
    model.eval()
    try:
        for row in ids[: have * data.length].view(-1, data.length):
            with torch.inference_mode():
                logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0, half - 1 : -1]
            found.append(float(cross_entropy(logits.float(), row[half:].to(logits.device))))
    finally:
        model.train(was_training)
    return found


def _text(name: str) -> str:
    if name == MANUAL:
        topics = pydoc_data.topics.topics
        return "\n\n".join(topics[topic] for topic in sorted(topics))[:_CHARACTERS]
    path = base_path("embedded-long") / "held_out.txt" if name == NOVELS else Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no text {name!r}: give a file, or {MANUAL} or {NOVELS}")
    return read_text(path)


def _asked(tokenizer: Any, question: str) -> str:
    if not tokenizer.chat_template:
        return f"{question}\n"
    message = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return str(text).removeprefix(tokenizer.bos_token or "")  # put before the prompt again when it is tokenised


def _row(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "output": answer, "answer": answer.strip()}
