"""From prompts to tokens: the one place that does so, for training, evaluation, generation and inspection.

Contract: the model is asked with exactly the tokens after which it has learned to answer. What a tokenizer's
post-processor puts before a text is kept; what it appends, which would end the text before its answer, is not. A chat
template writes its own special tokens, and nothing is added to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from moa.data.dialects import check_text
from moa.data.templates import CHAT, Chat, Prompt, answer_of, completion_of, prompt_of

_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "probe"}]


class Tokens(NamedTuple):
    """Token ids of one row; the ``answer`` of an example ends with end-of-text, or as the chat template ends a turn."""

    prompt: list[int]
    answer: list[int]


def prompt_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of what the model reads before it answers.

    Args:
        tokenizer: of the model.
        prompt: from `moa.data.prompt_of`, or any text.

    Raises:
        ValueError: no chat template, or one that cannot render the chat or would drop its tools.
    """
    tokens = [*_opening(tokenizer, prompt), *_ids(tokenizer, prompt_text(tokenizer, prompt))]
    if not tokens:
        raise ValueError("the prompt is empty: there is nothing to answer")
    return tokens


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """The text of a prompt, a chat as the tokenizer's template renders it up to where the assistant begins.

    Raises:
        ValueError: as `prompt_tokens`.
    """
    text = prompt if isinstance(prompt, str) else _render(tokenizer, prompt, ask=True)
    check_text("the prompt", text)
    return text


def example_tokens(tokenizer: Any, row: Mapping[str, Any], template: str) -> Tokens:
    """Token ids of a row's prompt and of the answer to learn.

    Args:
        tokenizer: of the model.
        row: from `moa.data.load_rows`.
        template: one of `moa.data.TEMPLATE_NAMES`.

    Raises:
        ValueError: as `prompt_tokens`; also a chat template that writes a prompt differently once it is answered, and
            a tokenizer without an end-of-text token where one is needed.
    """
    prompt = prompt_of(row, template)
    text = prompt_text(tokenizer, prompt)
    after = completion_of(row) if isinstance(prompt, str) else _chat_answer(tokenizer, prompt, answer_of(row), text)
    tokens = _continued(tokenizer, prompt, text, after)
    ended = isinstance(prompt, Chat) and end_of_turn(tokenizer)
    return tokens if ended else tokens._replace(answer=_with_end(tokenizer, tokens.answer))


def continued_tokens(tokenizer: Any, prompt: Prompt, after: str) -> Tokens:
    """Token ids of a prompt and of a text that goes on from it; nothing ends that.

    Raises:
        ValueError: as `prompt_tokens`.
    """
    return _continued(tokenizer, prompt, prompt_text(tokenizer, prompt), after)


def _continued(tokenizer: Any, prompt: Prompt, text: str, after: str) -> Tokens:
    """``text``: of the prompt."""
    check_text("the answer", after)
    before, whole = _ids(tokenizer, text), _ids(tokenizer, text + after)
    # Tokens that merge across the border would change the prompt: then the answer is tokenised alone.
    answer = whole[len(before) :] if whole[: len(before)] == before else _ids(tokenizer, after)
    return Tokens([*_opening(tokenizer, prompt), *before], answer)


def end_of_turn(tokenizer: Any) -> set[int]:
    """The special token with which the tokenizer's chat template ends an answer; empty without one.

    It need not be the tokenizer's end-of-text token: a base model that was given a chat template has another.
    """
    if not tokenizer.chat_template:
        return set()
    try:
        answered = _render(tokenizer, Chat(_PROBE), ask=False)
    except ValueError:  # a template for other conversations than this
        return set()
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = _ids(tokenizer, answered.rpartition(_PROBE[1]["content"])[2])
    return set([id for id in after if id in special][:1])


def check_template(tokenizer: Any, template: str, base: str) -> None:
    """Raise ValueError if ``template`` is the chat template of a tokenizer that has none."""
    if template == CHAT and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {base!r} has no chat template, which chat messages and template='chat' need: take the "
            "chat model of its family, or rows with an instruction and another template, such as alpaca"
        )


def _opening(tokenizer: Any, prompt: Prompt) -> list[int]:
    return [] if isinstance(prompt, Chat) else opening(tokenizer)


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer's post-processor puts before a text, such as the begin-of-text token; chats get nothing."""
    bare = _ids(tokenizer, "a")
    whole = list(tokenizer("a")["input_ids"])
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return whole[:place]
    raise ValueError(f"{type(tokenizer).__name__} changes a text's own tokens when it adds special ones")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _with_end(tokenizer: Any, answer: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token, so no answer could end: set its eos_token")
    return answer if answer[-1:] == [end] else [*answer, end]


def _chat_answer(tokenizer: Any, prompt: Chat, answer: Mapping[str, Any], asked: str) -> str:
    answered = _render(tokenizer, replace(prompt, messages=[*prompt.messages, answer]), ask=False)
    if not answered.startswith(asked):
        common = next(i for i, pair in enumerate(zip(asked, answered + "\0", strict=False)) if pair[0] != pair[1])
        raise ValueError(
            f"{_at(prompt)}the chat template writes this prompt differently once it is answered, so the model would be "
            f"asked in another form than it learned: it ends {asked[common - 20 :]!r} when asked and goes on "
            f"{answered[common - 20 : common + 40]!r} when answered. Change the template, or give rows with 'prompt' "
            "and 'completion'"
        )
    return answered[len(asked) :]


def _render(tokenizer: Any, chat: Chat, *, ask: bool) -> str:
    """``ask``: up to where the assistant begins, for messages that it did not end."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(f"{_at(chat)}a chat needs a chat template, and this tokenizer has none")
    template = tokenizer.get_chat_template(tools=chat.columns.get("tools"))
    for name in ("tools", "documents"):
        if chat.columns.get(name) and not re.search(rf"\b{name}\b", template):
            raise ValueError(f"{_at(chat)}the row has {name!r}, which the tokenizer's chat template does not read")
    settings = {"add_generation_prompt": ask, "tokenize": False, "chat_template": template}
    try:
        return str(tokenizer.apply_chat_template(list(chat.messages), **settings, **chat.columns))
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{_at(chat)}the tokenizer's chat template refuses the messages: {error}") from error


def _at(chat: Chat) -> str:
    return f"{chat.place}: " if chat.place else ""
