"""Field dialects of published instruction data, each converted to one form.

The common form is a dict of strings: ``instruction``, ``input``, ``output`` (the text to learn) and ``answer`` (the
gold answer, empty if the source has none). Rows with a ``prompt`` of their own keep it in place of an instruction, and
chat rows keep their ``messages``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]

_GOLD = re.compile(r"####\s*(.+?)\s*$")

KNOWN = (
    "instruction+output (with input and answer if there are any)",
    "question+answer",
    "Body+Question+Answer",
    "prompt+completion",
    "messages",
)


def convert(fields: Mapping[str, Any], *, split: str) -> Row:
    """One raw row in the common form.

    Args:
        fields: the row as it was read.
        split: ``"test"`` rows may do without an output, all others need one to learn from.

    Raises:
        ValueError: fields of no known dialect, of the wrong type, or empty; says which were found and needed.
    """
    row = _dialect(fields)
    if "messages" in row:
        return row
    if split == "test":
        if not (row["answer"] or row["output"].strip()):
            raise ValueError("neither an answer nor an output to compare with")
    elif not row["output"].strip():
        raise ValueError("the field 'output' is empty: there is nothing to learn")
    return row


def _dialect(fields: Mapping[str, Any]) -> Row:
    if "messages" in fields:
        return _chat(fields["messages"])
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
        output = _text(fields, "answer")
        gold = _GOLD.search(output)
        answer = gold.group(1) if gold else output.strip()
        return {"instruction": _text(fields, "question"), "input": "", "output": output, "answer": answer}
    raise ValueError(f"found the fields {sorted(map(str, fields))}, but needed one of: {'; '.join(KNOWN)}")


def _chat(messages: Any) -> Row:
    valid = isinstance(messages, list) and len(messages) > 1 and all(isinstance(m, Mapping) for m in messages)
    if not valid or any(not isinstance(m.get("content"), str) or "role" not in m for m in messages):
        raise ValueError("the field 'messages' must list at least two messages with 'role' and 'content'")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is from {messages[-1]['role']!r}, but must be the assistant's answer")
    return {"messages": messages, "output": messages[-1]["content"], "answer": ""}


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
    return str(value)
