"""From a row to the prompt a model reads and the completion it learns, before any tokenizer.

A prompt is a text, or a `Chat` for the tokenizer's own chat template. The texts of `TEMPLATES` end at the colon of
``### Response:`` and their completions start with exactly one space. Byte-level tokenizers put a newline into the same
token as the colon before it, so a completion that starts with one (as in LLM-Adapters' files) would end the prompt
differently in training than in generation. End-of-text is added with the tokens, see `moa.data.tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from moa.choices import check_choice

CHAT: Final = "chat"
NONE: Final = "none"


@dataclass(frozen=True)
class Template:
    """Two format strings.

    Attributes:
        plain: for rows without input; knows ``{instruction}``.
        with_input: for rows with one; knows ``{instruction}`` and ``{input}``.
    """

    plain: str
    with_input: str

    def fill(self, instruction: str, text: str) -> str:
        """The prompt of one row, ``text`` being its possibly empty input."""
        if text.strip():
            return self.with_input.format(instruction=instruction, input=text)
        return self.plain.format(instruction=instruction)


TEMPLATES: dict[str, Template] = {
    "alpaca": Template(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    ),
    "short": Template(
        "### Instruction:\n{instruction}\n\n### Response:",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    ),
    NONE: Template("{instruction}", "{instruction}\n\n{input}"),
}
TemplateName = Literal["alpaca", "short", "none", "chat"]
"""What a recipe and ``--template`` may say: the texts above, or the tokenizer's chat template."""

TEMPLATE_NAMES: tuple[str, ...] = get_args(TemplateName)


@dataclass(frozen=True)
class Chat:
    """A prompt of messages, which a tokenizer's chat template renders.

    Attributes:
        messages: dicts with ``role`` and ``content``, the last one not the assistant's.
        columns: what else the template may read, such as ``tools``, by name.
        place: where it was read, for messages.
    """

    messages: Sequence[Mapping[str, Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""


Prompt = str | Chat


def prompt_of(row: Mapping[str, Any], template: str) -> Prompt:
    """What the model reads before it answers.

    Args:
        row: from `load_rows`. One that came with a ``prompt`` of its own keeps it, whatever the template; one with
            ``messages`` is always a chat.
        template: one of `TEMPLATE_NAMES`.

    Raises:
        ValueError: unknown template.
    """
    check_choice("template", template, TEMPLATE_NAMES)
    if "messages" in row:
        return Chat(row["messages"][:-1], row.get("columns", {}), row.get("place", ""))
    if "prompt" in row:
        return str(row["prompt"])
    if template == CHAT:
        question = TEMPLATES[NONE].fill(row["instruction"], row.get("input", ""))
        return Chat([{"role": "user", "content": question}])
    return TEMPLATES[template].fill(row["instruction"], row.get("input", ""))


def completion_of(row: Mapping[str, Any]) -> str:
    """What the model learns to write after a text: one space, then the row's output without surrounding white space.

    A row with a prompt of its own keeps its output as it is.
    """
    return str(row["output"]) if "prompt" in row else f" {row['output'].strip()}"


def answer_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the model learns to write in a chat: the assistant's message."""
    return row["messages"][-1] if "messages" in row else {"role": "assistant", "content": row["output"].strip()}


def example_of(row: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A row in TRL's prompt-completion form, for trainers that tokenise themselves; chats conversational.

    Raises:
        ValueError: unknown template.
    """
    prompt = prompt_of(row, template)
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": completion_of(row)}
    example = {"prompt": list(prompt.messages), "completion": [answer_of(row)]}
    columns = dict(prompt.columns)
    if "tools" in columns:
        example["tools"] = columns.pop("tools")
    return example | {"chat_template_kwargs": columns} if columns else example


def form_of(rows: Iterable[Mapping[str, Any]], template: TemplateName) -> TemplateName:
    """The template that asks a new question in the form that ``rows`` have.

    Args:
        rows: training rows.
        template: of those rows among them that have an instruction.

    Raises:
        ValueError: some rows are chats and others texts.
    """
    forms: set[TemplateName] = {CHAT if "messages" in row else NONE if "prompt" in row else template for row in rows}
    if CHAT in forms and len(forms) > 1:
        raise ValueError("data.train mixes chat messages with plain rows: use one kind in a run")
    return forms.pop() if len(forms) == 1 else template
