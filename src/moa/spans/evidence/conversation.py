"""Passages as tokens: the model's own chat template, questions, and how an answer begins."""

from __future__ import annotations

from typing import Any

from moa.spans.evidence.sources import Passage


def prompt_tokens(tokenizer: Any, passage: Passage, room: int) -> list[int]:
    """A prompt of at most ``room`` tokens; what is too long is cut out of the context's middle.

    Raises:
        ValueError: question and template alone need more.
    """
    prompt = _prompt(tokenizer, passage, passage.context)
    if len(prompt) <= room or passage.plain:
        return prompt
    context = token_ids(tokenizer, passage.context)
    kept = room - len(_prompt(tokenizer, passage, ""))
    while kept > 0:
        head, tail = context[: kept - kept // 2], context[len(context) - kept // 2 :]
        prompt = _prompt(tokenizer, passage, tokenizer.decode(head) + tokenizer.decode(tail))
        if len(prompt) <= room:
            return prompt
        kept -= len(prompt) - room  # text cut in two places can take more tokens than before
    raise ValueError(f"the question and its template leave no room for a text within {room} tokens")


def conversation(tokenizer: Any, passage: Passage) -> tuple[list[int], list[range]]:
    """A passage with all of its questions and known answers.

    Returns:
        Tokens, and where each answer's are (its beginning aside, which is given).
    """
    text, places = _written(tokenizer, passage)
    tokens: list[int] = []
    answers: list[range] = []
    done = 0
    for start, end in places:
        tokens += _first(tokenizer, text[done:start]) if not tokens else token_ids(tokenizer, text[done:start])
        answer = token_ids(tokenizer, text[start:end])
        answers.append(range(len(tokens), len(tokens) + len(answer)))
        tokens += answer
        done = end
    return tokens + token_ids(tokenizer, text[done:]), answers


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a piece of text, without special ones around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def begun(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text to be gone on with: with the special tokens that stand before it, without those after it."""
    own, whole = token_ids(tokenizer, text), list(tokenizer(text)["input_ids"])
    fits = (place for place in range(len(whole) - len(own) + 1) if whole[place : place + len(own)] == own)
    start = next(fits, None)
    return whole if start is None else whole[: start + len(own)]


def _first(tokenizer: Any, text: str) -> list[int]:
    """The beginning of a text: a chat template has written its special tokens already."""
    return token_ids(tokenizer, text) if tokenizer.chat_template else begun(tokenizer, text)


def _written(tokenizer: Any, passage: Passage) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and where the answers stand in it, the blank before each included."""
    said = [f"{turn.start} {turn.answer}." for turn in passage.turns]
    asked = [turn.question for turn in passage.turns]
    asked[0] = f"{passage.context}\n\n{asked[0]}"
    if tokenizer.chat_template:
        messages = [
            {"role": role, "content": content}
            for pair in zip(asked, said, strict=True)
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        text = "\n".join(f"{question}\n{answer}" for question, answer in zip(asked, said, strict=True))
    # Facts may stand in the context word by word as they are answered: answers come behind it.
    places, done = [], max(text.find(passage.context), 0) + len(passage.context)
    for turn, answer in zip(passage.turns, said, strict=True):
        if (found := text.find(answer, done)) < 0:
            raise ValueError(f"the chat template of {type(tokenizer).__name__} leaves out the answer {answer!r}")
        done = found + len(answer) - 1
        places.append((done - len(f" {turn.answer}"), done))
    return text, places


def _prompt(tokenizer: Any, passage: Passage, context: str) -> list[int]:
    (turn,) = passage.turns
    if passage.plain and not tokenizer.chat_template:
        return begun(tokenizer, context)
    text = context if passage.plain else f"{context}\n\n{turn.question}"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        said = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return token_ids(tokenizer, said + turn.start)
    return begun(tokenizer, f"{text}\n{turn.start}")
