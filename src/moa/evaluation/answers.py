"""From a model's text to its answer, by one fixed rule per kind of answer.

Contract: a rule sees the generated text alone, never the gold answer, and gives the same result on every machine.
What a text says explicitly ("The answer is ...") wins over everything else in it, and its last explicit statement
over earlier ones; a text without an answer of the kind gives None, which counts as wrong.

| kind | answers | without an explicit statement |
|---|---|---|
| `number` | 12, -3.5, 1,200 | always the last number, as in the published protocol; equal within 1e-3 |
| `choice` | A to E | "C" at the end, then the last "option C", "(C)", "C)", "C:" or "C.", then "C" on its own |
| `bool` | true, false | last mention |
| `label` | solution1, answer2, ending3, option4 | last mention |
| `json` | an object | always the text's first JSON object; equal up to spacing and the order of keys |
| `text` | anything else | the whole text; equal up to case, spacing and closing punctuation |
| `begins` | anything, only where asked for | right if the text begins with it and does not run on into a longer word |

The published rule for letters, the first capital A to E anywhere, reads "Answer: B" as A and is not used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

NUMBER_TOLERANCE = 1e-3

_DIGITS = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?P<sign>(?<![\w)])[-−])?(?:(?<=[-−])\$)?(?<![\d.])(?P<digits>{_DIGITS})")
_SAYS = r"\banswer(?:\s+is|\s*:)(?!\s+not\b)(?:\s+(?:option|choice))?"
_MARKUP = r"[\s:*_\"'`$(\[{]*(?:\\boxed\{|\\text\{)*"
_EXPLICIT_LETTER = re.compile(
    rf"(?i:{_SAYS}){_MARKUP}(?:(?P<capital>[A-E])(?![\w'’])|(?P<small>[a-e])(?=\s*(?:[).,:\]}}*\"]|$)))", re.MULTILINE
)
_LETTERS = (
    re.compile(r"(?<![\w'’-])([A-E])[\s)\]}.*_\"'`]*$"),
    re.compile(r"\b(?:[Oo]ption|[Cc]hoice)\s\(?([A-E])(?![\w'’])"),
    re.compile(r"\(\s?([A-E])\s?\)"),
    re.compile(r"(?<![\w'’-])([A-E])\s?(?:\)|:|\.(?=\s))"),
    re.compile(r"(?<![\w'’-])([B-E]|A(?!\s[a-z]))(?![\w'’-])"),  # "A train" is an article
)
_BOOL = r"(true|false)\b"
_LABEL = r"((?:solution|answer|ending|option)\s?\d+)\b"
_EXPLICIT_TEXT = re.compile(r"\banswer\s+is\b[\s:]*([^\n]*)", re.IGNORECASE)


def extract(kind: str, text: str) -> str | None:
    """The answer in a generated text, in the form in which gold answers are written.

    Args:
        kind: "number", "choice", "bool", "label", "json", "text" or "begins".
        text: what the model generated, without its prompt.

    Returns:
        The answer, or None where the text has none of this kind.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in _RULES:
        raise ValueError(f"there is no rule for answers of kind {kind!r}; kinds are {sorted(_RULES)}")
    return _RULES[kind](text)


def is_correct(kind: str, text: str, gold: str) -> bool:
    """Whether the answer in a generated text is the gold answer.

    Raises:
        ValueError: unknown kind, or a gold answer that is not of this kind.
    """
    wanted, answer = wanted_of(kind, gold), extract(kind, text)
    if answer is None:
        return False
    if kind == "begins":
        return answer.startswith(wanted) and not answer[len(wanted) : len(wanted) + 1].isalnum()
    return abs(float(answer) - float(wanted)) <= NUMBER_TOLERANCE if kind == "number" else answer == wanted


def wanted_of(kind: str, gold: str) -> str:
    """A gold answer in the form that `extract` gives.

    Raises:
        ValueError: unknown kind, or a gold answer that is not of this kind.
    """
    wanted = extract(kind, gold)
    if wanted is None:
        raise ValueError(f"the gold answer {gold!r} is not a {kind}")
    return wanted


def kind_of(golds: Iterable[str]) -> str:
    """The kind of a data set's answers: the first whose form all of its gold answers have, else "text"."""
    golds = [str(gold).strip() for gold in golds]
    if golds and all(gold.startswith("{") and _json(gold) is not None for gold in golds):
        return "json"
    for kind, form in _FORMS.items():
        if golds and all(form.fullmatch(gold) for gold in golds):
            return kind
    return "text"


def fields_right(text: str, gold: str) -> dict[str, bool]:
    """For answers of kind "json": which of the gold object's fields the text's first object has with the same value.

    Raises:
        ValueError: the gold answer holds no JSON object.
    """
    wanted, answer = _object(gold), _object(text) or {}
    if wanted is None:
        raise ValueError(f"the gold answer {gold!r} is not a json")
    return {name: name in answer and _canonical(answer[name]) == _canonical(value) for name, value in wanted.items()}


def _object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text."""
    decoder = json.JSONDecoder()
    for start in re.finditer(r"\{", text):
        try:
            return decoder.raw_decode(text, start.start())[0]
        except ValueError:
            continue
    return None


def _canonical(value: Any) -> str:
    """One text for equal values; unlike ``==``, it tells true from 1."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _json(text: str) -> str | None:
    found = _object(text)
    return None if found is None else _canonical(found)


def _number(text: str) -> str | None:
    found = [("-" if match["sign"] else "") + match["digits"].replace(",", "") for match in _NUMBER.finditer(text)]
    return found[-1] if found else None


def _choice(text: str) -> str | None:
    explicit = [found["capital"] or found["small"].upper() for found in _EXPLICIT_LETTER.finditer(text)]
    if explicit:
        return explicit[-1]
    for rule in _LETTERS:
        if found := rule.findall(text):
            return found[-1]
    return None


def _mention(form: str) -> Callable[[str], str | None]:
    explicit = re.compile(rf"{_SAYS}{_MARKUP}{form}", re.IGNORECASE)
    anywhere = re.compile(rf"\b{form}", re.IGNORECASE)

    def rule(text: str) -> str | None:
        found = explicit.findall(text) or anywhere.findall(text)
        return "".join(found[-1].lower().split()) if found else None

    return rule


def _text(text: str) -> str | None:
    explicit = _EXPLICIT_TEXT.findall(text)
    return _normal(explicit[-1] if explicit else text) or None


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .,:;!?\"'`*")


_RULES: dict[str, Callable[[str], str | None]] = {
    "number": _number,
    "choice": _choice,
    "bool": _mention(_BOOL),
    "label": _mention(_LABEL),
    "json": _json,
    "text": _text,
    "begins": lambda text: text.strip() or None,
}
_FORMS = {
    "number": re.compile(rf"-?\$?(?:{_DIGITS})"),  # "3,5" and "74,66" are none, of which a rule would read the end
    "choice": re.compile(r"[A-E]"),
    "bool": re.compile(_BOOL, re.IGNORECASE),
    "label": re.compile(_LABEL, re.IGNORECASE),
}
