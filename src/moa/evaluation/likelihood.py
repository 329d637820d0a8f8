"""Choices by likelihood: which of a row's possible answers the model finds most likely.

A small model still guesses at letters and labels when it can tell the answers apart; likelihood needs no form to be
learned. Every choice stands behind the very tokens that `moa eval` asks with, in the words that the row's own answer
has, and is worth the sum of its tokens' log-probabilities: what lm_eval calls ``acc``. lm_eval itself is not asked,
since it makes tokens of its own: it puts a begin-of-text token before chats, takes what a tokenizer appends to a prompt
for the answer's, and cuts what is too long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moa.data.templates import Prompt, prompt_of
from moa.data.tokens import continued_tokens
from moa.evaluation.accuracy import gold_of
from moa.evaluation.answers import extract
from moa.evaluation.loss import losses_of

KINDS = ("bool", "choice", "label")
"""Kinds of answers that are one of a few, see `moa.evaluation.answers`."""

_FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)")
_LETTER = re.compile(r"(?<!\w)([A-E])\s?[).:]")
_LABEL = re.compile(r"\b((?:solution|answer|ending|option)\d+)\b", re.IGNORECASE)
_STATED = re.compile(r"(?:^|[.\n]\s*)((?:so )?the (?:correct )?answer is )\S+$", re.IGNORECASE)


def choices_of(row: Mapping[str, Any], kind: str) -> list[str]:
    """What a row may be answered with, in the order in which its question names them.

    Raises:
        ValueError: the gold answer is not among them, or there is nothing to choose from.
    """
    asked = _question(row)
    stated = _FORMAT.search(asked)
    found = {
        "bool": lambda: ["true", "false"],
        "choice": lambda: sorted(set(_LETTER.findall(asked))),
        "label": lambda: stated[1].split("/") if stated else [label.lower() for label in _LABEL.findall(asked)],
    }[kind]()
    found = list(dict.fromkeys(found))
    gold = extract(kind, gold_of(row))
    if gold not in found or len(found) < 2:
        raise ValueError(
            f"the answer {gold!r} is not one of the choices {found} that the question names: {asked[:200]!r}"
        )
    return found


def chosen(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, template: str, kind: str, batch_size: int = 16
) -> list[bool]:
    """Per row, whether the gold answer is the most likely one of its choices.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        rows: from `moa.data.load_rows`.
        template: name of the prompt template the model was trained with.
        kind: one of `KINDS`.
        batch_size: choices per forward.

    Raises:
        ValueError: a kind of answers that is not one of a few, a row without choices, or one that is longer than the
            model's context.
    """
    if kind not in KINDS:
        raise ValueError(f"likelihood compares choices: kind={kind!r} is not one of {list(KINDS)}")
    choices = [choices_of(row, kind) for row in rows]
    examples = [
        continued_tokens(tokenizer, *pair)
        for row, named in zip(rows, choices, strict=True)
        for pair in _answers(row, named, template)
    ]
    losses = (loss for loss, _ in losses_of(model, examples, batch_size)) if examples else iter(())
    found = []
    for row, named in zip(rows, choices, strict=True):
        own = [next(losses) for _ in named]
        found.append(named[own.index(min(own))] == extract(kind, gold_of(row)))
    return found


def _question(row: Mapping[str, Any]) -> str:
    """What the row asks, before any template; of a chat everything that was said."""
    if "messages" in row:
        return "\n".join(message.get("content", "") for message in row["messages"][:-1])
    return str(row.get("prompt") or f"{row.get('instruction', '')}\n{row.get('input', '')}")


def _answers(row: Mapping[str, Any], choices: Sequence[str], template: str) -> Iterator[tuple[Prompt, str]]:
    """The row's prompt with each of its choices, in the words that its own answer has."""
    prompt = prompt_of(row, template)
    stated = _STATED.search(str(row.get("output") or "").strip().rstrip("."))
    # As in training: a text's answer starts with a space, a chat's does not.
    start = (" " if isinstance(prompt, str) else "") + (stated[1] if stated else "")
    yield from ((prompt, f"{start}{choice}") for choice in choices)
