"""From a row to the prompt a model reads and the completion it learns.

A prompt ends at the colon of ``### Response:`` and a completion starts with exactly one space. Byte-level tokenizers
put a newline into the same token as the colon before it, so a completion that starts with one (as in LLM-Adapters'
files) would end the prompt differently in training than in generation. End-of-text is the trainer's to add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moa.adapters.choices import check_choice


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
}


def prompt_of(row: Mapping[str, Any], template: str) -> str:
    """What the model reads before it answers.

    Args:
        row: from `load_rows`. A row that came with a ``prompt`` of its own keeps it, whatever the template.
        template: a key of `TEMPLATES`.

    Raises:
        ValueError: unknown template, or a row of chat messages, which only a tokenizer's chat template can render.
    """
    check_choice("template", template, TEMPLATES)
    if "messages" in row:
        raise ValueError("a row of chat messages has no text prompt: use the tokenizer's chat template on them")
    if "prompt" in row:
        return str(row["prompt"])
    return TEMPLATES[template].fill(row["instruction"], row.get("input", ""))


def completion_of(row: Mapping[str, Any]) -> str:
    """What the model learns to write: one space, then the row's output without surrounding white space."""
    return f" {row['output'].strip()}"


def example_of(row: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A row in TRL's prompt-completion form; chat messages become its conversational variant."""
    if "messages" in row:
        return {"prompt": list(row["messages"][:-1]), "completion": [row["messages"][-1]]}
    if "prompt" in row:
        return {"prompt": row["prompt"], "completion": row["output"]}
    return {"prompt": prompt_of(row, template), "completion": completion_of(row)}
