"""Rows of text and the templates that turn them into prompts and completions."""

from moa.data.rows import load_rows
from moa.data.templates import TEMPLATES, completion_of, example_of, prompt_of

__all__ = ["TEMPLATES", "completion_of", "example_of", "load_rows", "prompt_of"]
