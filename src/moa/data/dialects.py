"""Field dialects of published instruction data, each converted to one form.

The common form is a dict of strings: ``instruction``, ``input``, ``output`` (the text to learn) and ``answer`` (the
gold answer, empty if the source has none). Rows with a ``prompt`` of their own keep it in place of an instruction. Chat
rows keep their ``messages``, under ``columns`` whatever else the row has for a chat template to read, and as ``place``
where they were read, since a template may refuse them later.

Rules for all dialects: a field that is null or not a number (NaN) is absent; a row without a question or without an
answer is refused; so are text that UTF-8 cannot hold and numbers that are not finite.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from moa.choices import named
from moa.files import parsed

Row = dict[str, Any]

_GOLD = re.compile(r"####\s*(.*?)\s*$")

KNOWN = (
    "instruction+output (with input and answer if there are any)",
    "question+answer",
    "Body+Question+Answer",
    "prompt+completion",
    "messages",
)

_OURS = frozenset({"task", "place"})  # of rows that moa itself has written

_FOR_TEMPLATES = ("tools", "chat_template_kwargs")


def convert(fields: Mapping[str, Any], *, split: str, place: str) -> Row:
    """One raw row in the common form.

    Args:
        fields: the row as it was read.
        split: ``"test"`` rows may do without an output, all others need one to learn from.
        place: where it was read, for messages.

    Raises:
        ValueError: fields of no known dialect, of the wrong type, or empty; says where, which were found and needed.
    """
    with named(place):
        row = _converted(fields, split)
    return row | {"place": place} if "messages" in row else row


def _converted(fields: Mapping[str, Any], split: str) -> Row:
    if not isinstance(fields, Mapping):
        raise ValueError(f"a row must be a JSON object, not {type(fields).__name__}")
    row = _dialect({name: value for name, value in _without_nan(fields).items() if value is not None})
    if split == "test":
        if not (row["answer"].strip() or row["output"].strip()):
            raise ValueError("neither an answer nor an output to compare with")
    elif not row["output"].strip() and not ("messages" in row and row["messages"][-1].get("tool_calls")):
        name = "completion" if "prompt" in row else "output"
        raise ValueError(f"the field {name!r} is empty: there is nothing to learn")
    return row


def unread(fields: Mapping[str, Any]) -> set[str]:
    """Names of a row's fields that hold something and that its dialect has no use for; none in a chat."""
    if "messages" in fields:
        return set()
    if "prompt" in fields and "completion" in fields:
        read = {"prompt", "completion", "output", "answer"}
    elif "instruction" in fields:
        read = {"instruction", "input", "output", "answer"}
    elif {"Body", "Question", "Answer"} <= fields.keys():
        read = {"Body", "Question", "Answer"}
    else:
        read = {"question", "answer"}
    held = {name for name, value in fields.items() if not (value is None or _is_nan(value) or value in ("", [], {}))}
    return held - read - _OURS


def check_text(what: str, text: str) -> None:
    """Raise ValueError for text that UTF-8 cannot hold: JSON may spell half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"{what} has half of a surrogate pair, {half} at character {error.start + 1}, which is no text: "
            "repair it where it was cut, or leave it out"
        ) from None


def _dialect(fields: Mapping[str, Any]) -> Row:
    if "messages" in fields:
        return _chat(fields)
    for name in _FOR_TEMPLATES:
        if not _is_empty(fields.get(name)):
            raise ValueError(f"the field {name!r} is read by chat templates alone: give this row as 'messages'")
    if "prompt" in fields and "completion" in fields:
        return {
            "prompt": _text(fields, "prompt"),
            "output": _text(fields, "completion", may_be_empty=True),
            "answer": _text(fields, "answer", may_be_empty=True),
        }
    if "instruction" in fields and ("output" in fields or "answer" in fields):
        row: Row = {"instruction": _text(fields, "instruction")}
        return row | {name: _text(fields, name, may_be_empty=True) for name in ("input", "output", "answer")}
    if {"Body", "Question", "Answer"} <= fields.keys():
        answer = _text(fields, "Answer")
        question = f"{_text(fields, 'Body').strip()} {_text(fields, 'Question').strip()}"
        return {"instruction": question, "input": "", "output": f"The answer is {answer}.", "answer": answer}
    if "question" in fields and "answer" in fields:
        return _question(fields)
    raise ValueError(f"found the fields {sorted(map(str, fields))}, but needed one of: {'; '.join(KNOWN)}")


def _question(fields: Mapping[str, Any]) -> Row:
    output = _text(fields, "answer")
    gold = _GOLD.search(output)
    if gold and not gold[1]:
        raise ValueError("the field 'answer' has nothing after its '####'")
    answer = gold[1] if gold else output.strip()
    return {"instruction": _text(fields, "question"), "input": "", "output": output, "answer": answer}


def _chat(fields: Mapping[str, Any]) -> Row:
    messages = fields["messages"]
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError("the field 'messages' must list at least two messages with 'role' and 'content'")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for number, message in enumerate(messages):
        _check_message(f"messages[{number}]", message)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is from {messages[-1]['role']!r}, but must be the assistant's answer")
    row: Row = {
        "messages": messages,
        "output": messages[-1].get("content", ""),
        "answer": _text(fields, "answer", may_be_empty=True),
    }
    if columns := _columns(fields):
        row["columns"] = columns
    for place, value in _leaves(row):
        _check_leaf(place, value)
    return row


def _check_message(place: str, message: Mapping[str, Any]) -> None:
    if not isinstance(message.get("role"), str):
        raise ValueError(f"the field '{place}' must have a 'role' and a 'content'")
    calls = message.get("tool_calls")
    content = message.get("content", "" if calls else None)
    if not isinstance(content, str):
        kind = "missing" if content is None else type(content).__name__
        raise ValueError(f"the field '{place}' must have a 'content' of text, not {kind}")
    if message["role"] in ("user", "assistant") and not content.strip() and not calls:
        raise ValueError(f"the field '{place}.content' is empty")


@cache
def _fixed() -> frozenset[str]:
    """Settings of ``apply_chat_template`` itself, which no row can set."""
    from transformers import PreTrainedTokenizerBase

    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"tools", "documents"}


def _columns(fields: Mapping[str, Any]) -> Row:
    """What else a chat row holds, by the name under which a chat template may read it."""
    columns = {name: value for name, value in fields.items() if name not in ("messages", "answer", *_FOR_TEMPLATES)}
    settings = _structure(fields, "chat_template_kwargs", dict) or {}
    fixed = _fixed()
    refused = sorted(fixed & settings.keys()) + (["chat_template"] if "chat_template" in columns else [])
    if refused:
        raise ValueError(f"the field {refused[0]!r} cannot be set by a row: leave it out")
    columns = {name: value for name, value in columns.items() if name not in fixed} | settings
    for name in ("tools", "documents"):
        value = _structure({**fields, **columns}, name, list)
        columns.pop(name, None)
        if value is None:
            continue
        if not all(isinstance(item, Mapping) for item in value):
            raise ValueError(f"the field {name!r} must list objects")
        columns[name] = value
    return columns


def _structure(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field that holds a list or an object, or JSON text of one, as tables without nested columns have it."""
    value = fields.get(name)
    if isinstance(value, str) and value.strip():
        value = parsed(value, f"the field {name!r}")
    if _is_empty(value):
        return None
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "an object"
        raise ValueError(f"the field {name!r} must be {wanted}, not {type(value).__name__}")
    return value


def _text(fields: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    """A field as text; whole numbers lose the ``.0`` that JSON gives them."""
    value = fields.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        if may_be_empty:
            return ""
        raise ValueError(f"the field {name!r} is empty")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the field {name!r} must be text or a number, not {type(value).__name__}")
    _check_leaf(name, value)
    return str(value)


def _without_nan(value: Any) -> Any:
    """Nested dicts without the NaN that tables write for a missing value."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items() if not _is_nan(item)}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value) or value in ("[]", "{}")


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and lists, keys included, with its place, such as ``messages[0].role``."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield place or "(names)", key
            yield from _leaves(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{place}[{number}]")
    else:
        yield place, value


def _check_leaf(place: str, value: Any) -> None:
    if isinstance(value, str):
        check_text(f"the field {place!r}", value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the field {place!r} is {value}, which is no finite number")
