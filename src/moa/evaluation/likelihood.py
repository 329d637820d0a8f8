"""Choices by likelihood, as lm_eval scores them: which of a row's possible answers the model finds most likely.

A small model still guesses at letters and labels when it can tell the answers apart; likelihood needs no form to be
learned. Every row becomes a document of an lm_eval task of ours, whose context is the very prompt that `moa eval` asks
with, and whose choices are what the row may be answered with, in the words that its own answer has.

Free answers stay with `moa.evaluation.answers`: lm_eval has filters for single published sets, but no rule that reads
the same answer from all of them, falls back in the same order, and is tested against texts that mislead.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moa.data.templates import prompt_of
from moa.data.tokens import prompt_text, prompt_tokens
from moa.evaluation.accuracy import gold_of
from moa.evaluation.answers import extract
from moa.extras import extra

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
    asked = str(row.get("prompt") or f"{row.get('instruction', '')}\n{row.get('input', '')}")
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
        ValueError: a kind of answers that is not one of a few, or a row without choices.
    """
    if kind not in KINDS:
        raise ValueError(f"likelihood compares choices: kind={kind!r} is not one of {list(KINDS)}")
    documents = [_document(tokenizer, row, template, kind) for row in rows]
    with extra("bench"):
        import datasets
        from lm_eval import simple_evaluate
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task = ConfigurableTask(
        config={
            "task": "moa",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "asked",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
    )
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    opened = prompt_tokens(tokenizer, "a") != bare  # by a begin-of-text token
    was_training = model.training
    model.eval()
    try:
        asker = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=opened)
        alone = TaskManager(include_defaults=False)  # which else reads the thousands of files of its own tasks first
        found = simple_evaluate(asker, tasks=[task], task_manager=alone, bootstrap_iters=0, log_samples=True)
    finally:
        model.train(was_training)
    samples = sorted(found["samples"]["moa"], key=lambda sample: sample["doc_id"])
    return [bool(sample["acc"]) for sample in samples]


def _document(tokenizer: Any, row: Mapping[str, Any], template: str, kind: str) -> dict[str, Any]:
    prompt = prompt_of(row, template)
    choices = choices_of(row, kind)
    stated = _STATED.search(str(row.get("output") or "").strip().rstrip("."))
    # As in training: a text's answer starts with a space, a chat's does not.
    start = (" " if isinstance(prompt, str) else "") + (stated[1] if stated else "")
    return {
        "asked": prompt_text(tokenizer, prompt),
        "choices": [f"{start}{choice}" for choice in choices],
        "gold": choices.index(str(extract(kind, gold_of(row)))),
    }
