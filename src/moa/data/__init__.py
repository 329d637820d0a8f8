"""Rows of text, the templates that turn them into prompts and completions, and the tokens of these."""

from moa.data.rows import load_rows
from moa.data.templates import (
    TEMPLATE_NAMES,
    TEMPLATES,
    Chat,
    Prompt,
    completion_of,
    example_of,
    form_of,
    prompt_of,
)
from moa.data.tokens import example_tokens, prompt_text, prompt_tokens

__all__ = [
    "TEMPLATES",
    "TEMPLATE_NAMES",
    "Chat",
    "Prompt",
    "completion_of",
    "example_of",
    "example_tokens",
    "form_of",
    "load_rows",
    "prompt_of",
    "prompt_text",
    "prompt_tokens",
]
